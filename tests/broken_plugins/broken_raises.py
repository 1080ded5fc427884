"""Fails when it is imported."""

raise RuntimeError("its device is not there")
