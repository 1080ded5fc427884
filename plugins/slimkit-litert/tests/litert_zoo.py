"""A program: one architecture in float and int8 through LiteRT, as a line of JSON.

python litert_zoo.py LIBRARY NAME [SIDE]
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimkit
from slimkit.deploy.agreement import compare
from slimkit.deploy.deployed import simulate
from slimkit.progress import quiet
from slimkit.quantization.finished import finish

with contextlib.suppress(ImportError):
    import torchvision_ops  # noqa: F401  (lets torchvision import beside a CPU build of torch)


def built(library: str, name: str) -> nn.Module:
    """An architecture with random weights, and batch-norms that keep their inputs' spread."""
    torch.manual_seed(0)
    if library == "timm":
        import timm

        return timm.create_model(name)
    import torchvision

    return torchvision.models.get_model(name)


@torch.no_grad()
def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """In evaluation mode, with the statistics of `x`; others let numbers die out or explode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the plain mean
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    model(x)
    return model.eval()


def row(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What `check` says; where it says nothing, the agreement with the model and the operators."""
    from slimkit_litert.backend import LiteRt  # pytest looks for doctests in this file as well

    engine, start = LiteRt(), time.perf_counter()
    deployable = finish(model, (x[:1],))
    problems = engine.check(deployable)
    if problems:
        return {"refused": problems}
    with tempfile.TemporaryDirectory() as folder:
        engine.compile(deployable, Path(folder))
        run, counts = engine.load(Path(folder)), engine.operators(Path(folder))
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    found = [torch.cat(c) for c in zip(*(run(one) for one in x.split(1)), strict=True)]
    agreement = compare(simulate(model, x), found)
    return {
        "sqnr_db": min(agreement.sqnr_db),
        "integer": sum(n for name, n in counts.items() if name.endswith("int8")),
        "layers_in_float": sum(counts.get(k, 0) for k in ("CONV_2D", "DEPTHWISE_CONV_2D")),
        "transposes": sum(n for name, n in counts.items() if name.startswith("TRANSPOSE")),
        "operators": counts,
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(library: str, name: str, side: int = 96) -> None:
    """Print the row."""
    x = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    with quiet():
        model = settled(built(library, name), x)
        small = slimkit.quantize(model, [x], backend="litert", activations="minmax").eval()
        print(json.dumps({"float": row(model, x), "int8": row(small, x)}))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
