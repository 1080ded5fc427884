"""Quantizers: which range of values the integers cover."""
