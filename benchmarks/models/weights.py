"""Puts the weights of the data folder into a network."""

from __future__ import annotations

from typing import TypeVar

from safetensors.torch import load_file
from torch import nn

from benchmarks.folder import data_folder

Net = TypeVar("Net", bound=nn.Module)


def loaded(model: Net, name: str, root: str | None = None) -> Net:
    """Return `model` with the weights ``weights/<name>.safetensors`` of the data folder `root`.

    Raises:
        SlimkitError: if there is no data folder.
    """
    model.load_state_dict(load_file(data_folder(root) / f"weights/{name}.safetensors"))
    return model
