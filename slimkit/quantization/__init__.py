"""Quantization: where the rounding is, how ranges are found, and the finished integer model."""
