"""Every error that slimkit raises on purpose, and the exit code that the command line gives it."""

from __future__ import annotations


class SlimkitError(Exception):
    """Bad input: the message names the thing, the place and the way out.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class RecipeError(SlimkitError):
    """A recipe cannot be used; the message lists every problem with its path."""


class PluginError(SlimkitError):
    """A plugin cannot be found, is broken, or failed while slimkit used it."""


class PruningError(SlimkitError):
    """Nothing was pruned, or the asked target cannot be reached."""


class QuantizationError(SlimkitError):
    """Nothing was quantized, or calibration data or ranges are unusable."""


class ExportError(SlimkitError):
    """A backend cannot compile or run this model."""


class ArtifactError(SlimkitError):
    """An artifact folder is damaged, incomplete, or does not fit the model."""


class GateError(SlimkitError):
    """The deployed files work but miss a gate of the recipe."""

    exit_code = 3
