"""Deployment: compile, run the file, prove that it agrees, measure it, keep it safe."""
