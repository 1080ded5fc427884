"""Rewrites of a float model for its target: the same function in other operations, or nearly."""
