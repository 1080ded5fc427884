"""Loads a state dict from a file into a model."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from slimkit.errors import SlimkitError


def load_weights(model: nn.Module, path: Path, way_out: str = "") -> None:
    """Load a .safetensors file, or a .pt file of tensors only, strictly.

    Args:
        model: loaded in place.
        path: of the file.
        way_out: ends the message of an error.

    Raises:
        SlimkitError: the file cannot be read or does not fit the model.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}, not a state dict")
            state = state.get("state_dict", state)
        plain = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
        model.load_state_dict(plain, strict=True)  # torch.compile adds to names; models are plain
    except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        first = "\n  ".join(str(error).splitlines()[:4])
        end = f"; {way_out}" if way_out else ""
        raise SlimkitError(
            f"weights: {path} cannot be loaded into the model: {first}{end}"
        ) from error


def sick(module: nn.Module) -> str:
    """The first parameter that holds NaN or infinity; empty if none does. Buffers may: masks do."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter.detach()).all():
            return name
    return ""
