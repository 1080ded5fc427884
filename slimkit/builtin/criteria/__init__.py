"""Pruning criteria: which weights matter least."""
