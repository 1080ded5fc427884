"""Runs the command line with ``python -m slimkit``."""

from slimkit.cli.main import main

main()
