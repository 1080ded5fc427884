"""The data, model and recipe that `slimkit run` can be tried on without any download."""
