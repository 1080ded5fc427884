"""`save`: a compressed model as weights and a manifest, without a file for any runtime."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from slimkit.acceptance import check_module
from slimkit.deploy.artifact import Contents, write
from slimkit.deploy.folder import check_target, replacing
from slimkit.errors import ArtifactError
from slimkit.fields import is_import_path
from slimkit.quantization.fake import QuantizedModel


def save(model: nn.Module, directory: str | Path, *, built_by: str | None = None) -> Path:
    """Write `model` so that `slimkit.load` gives it back, and nothing else can go wrong on the way.

    The folder holds ``weights.safetensors``, the plain state dict of the small model (quantizer
    ranges beside it where it is quantized), and ``slimkit.json`` with the kept positions of every
    tensor and the hash of every file. No code is pickled: the module is rebuilt by the function
    that made the dense one.

    Args:
        model: what `slimkit.prune` or `slimkit.quantize` returned, trained on or not.
        directory: the folder; a slimkit folder that lies there is replaced once all is written.
        built_by: ``package.module:function`` that builds the dense model; left out, `slimkit.load`
            must be given ``model=``.

    Returns:
        The folder.

    Raises:
        ArtifactError: the folder holds something else, or `built_by` is no import path.

    Example:
        >>> import tempfile, torch, slimkit
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Linear(32, 4))
        >>> small = slimkit.prune(build(), torch.randn(1, 8), target={"flops": 0.5})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = slimkit.load(save(small, folder + "/small"), model=build)
        >>> again[0].out_features
        16
    """
    check_module(model, "save")
    folder = Path(directory)
    if built_by is not None and not is_import_path(built_by):
        raise ArtifactError(f"built_by should look like 'package.module:name', not {built_by!r}")
    check_target(folder)
    quantized = {model.backend: model} if isinstance(model, QuantizedModel) else {}
    network = model.model if isinstance(model, QuantizedModel) else model
    origin = None if built_by is None else {"target": built_by, "options": {}}
    with replacing(folder) as work:
        write(work, Contents(network, quantized, model=origin))
    return folder
