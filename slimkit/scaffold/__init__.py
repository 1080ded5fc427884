"""Writes new plugin packages from templates; `slimkit new-plugin` calls it."""
