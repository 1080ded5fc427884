"""Prunes one architecture in a process of its own and prints what came out as one line of JSON.

python benchmarks/zoo/one.py timm cspdarknet53 --tool slimkit
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from contextlib import suppress
from typing import Any

with suppress(ImportError):  # beside a CPU build of torch, torchvision needs its operators' names
    import torchvision_ops  # noqa: F401

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def build(library: str, name: str) -> tuple[nn.Module, Tensor]:
    """The architecture with random weights in evaluation mode, and one image for it."""
    torch.manual_seed(0)
    if library == "torchvision":
        import torchvision

        more = {"weights_backbone": None} if name.startswith(("deeplab", "lraspp", "fcn")) else {}
        more |= {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **more)
        size = 299 if name == "inception_v3" else 224
    else:
        import timm

        model = timm.create_model(name, pretrained=False)
        size = model.default_cfg["input_size"][-1]
    return lived_in(model).eval(), torch.randn(1, 3, size, size)


@torch.no_grad()
def lived_in(model: nn.Module) -> nn.Module:
    """Give what starts as all zeros or all ones numbers as training leaves them.

    Else layer scales, zero-initialised heads and last norms of a block would silence their branch,
    and comparing outputs would prove nothing.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.max() == tensor.min():
            if tensor.dim() > 1 and tensor[0].numel() > 1:
                tensor.normal_(0.0, tensor[0].numel() ** -0.5)
            elif name.endswith(("bias", "running_mean")):
                tensor.normal_(0.0, 0.3)
            else:
                tensor.uniform_(0.5, 1.5)
    return model


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates by PyTorch's own count."""
    frozen = copy.deepcopy(model).requires_grad_(False)  # the counter fails on a parameter's views
    torch.backends.mha.set_fastpath_enabled(False)  # what it does is not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        frozen(x)
    return counter.get_total_flops() // 2


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """All output tensors, flat."""
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]


def with_slimkit(model: nn.Module, x: Tensor, target: float) -> tuple[nn.Module, dict[str, Any]]:
    """Prune to `target` of the MACs, without any argument for this architecture."""
    import slimkit

    small = slimkit.prune(model, x, target={"flops": target})
    report = small.slimkit_pruning
    reasons = sorted({r for r in report.frozen.values() if "output" not in r})
    return small, {"groups": len(report.groups), "frozen": report.frozen, "reasons": reasons}


def with_torch_pruning(
    model: nn.Module, x: Tensor, target: float
) -> tuple[nn.Module, dict[str, Any]]:
    """Torch-Pruning's own pruner with its defaults, one step to half of each layer's channels."""
    del target
    model = copy.deepcopy(model)
    _pruner(model, x, pruning_ratio=0.5, iterative_steps=1).step()
    return model, {}


def with_torch_pruning_to_target(
    model: nn.Module, x: Tensor, target: float
) -> tuple[nn.Module, dict[str, Any]]:
    """As its examples reach a target: in steps, counting after each, until enough is gone."""
    from torch_pruning.utils import count_ops_and_params

    model = copy.deepcopy(model)
    steps = 20  # of 2.5 % of the channels each, so that the target is met within about 4 points
    pruner = _pruner(model, x, pruning_ratio=0.5, iterative_steps=steps)
    dense, _ = count_ops_and_params(model, x)
    for _ in range(steps):
        pruner.step()
        if count_ops_and_params(model, x)[0] <= target * dense:
            break
    return model, {}


def _pruner(model: nn.Module, x: Tensor, **options: Any) -> Any:
    """The last linear layer is left alone; all else is Torch-Pruning's default."""
    import torch_pruning as tp

    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    importance = tp.importance.GroupMagnitudeImportance()
    return tp.pruner.BasePruner(
        model, x, importance=importance, ignored_layers=linear[-1:], **options
    )


TOOLS = {
    "slimkit": with_slimkit,
    "torch-pruning": with_torch_pruning,
    "torch-pruning-to-target": with_torch_pruning_to_target,
}


def silenced(model: nn.Module, kept: dict[str, dict[int, list[int]]], x: Tensor) -> list[Tensor]:
    """What the original computes with everything that is not kept set to zero, by hand."""
    zeroed = copy.deepcopy(model)
    state = zeroed.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, dims in kept.items():
            if name.endswith("running_var"):
                continue
            for dim, positions in dims.items():
                gone = torch.ones(state[name].shape[dim], dtype=torch.bool)
                gone[positions] = False
                state[name].data.movedim(dim, 0)[gone] = 0.0
    return outputs(zeroed, x)


def checked(model: nn.Module, small: nn.Module, x: Tensor, kept: Any) -> dict[str, Any]:
    """Whether the small model runs forward and backward, saves, exports, and computes right."""
    before, after = outputs(model, x), outputs(small, x)
    found: dict[str, Any] = {
        "shapes": [a.shape for a in before] == [a.shape for a in after],
        "finite": all(bool(a.isfinite().all()) for a in after),
    }
    # over fewer channels, or over fewer weights of a filter, a norm is another function by design
    over_channels = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    touched = {name.rpartition(".")[0] for name in kept or {}}
    normed = any(
        isinstance(m, over_channels) or "Std" in type(m).__name__ or "Norm" in type(m).__name__
        for name, m in model.named_modules()
        if name in touched and not isinstance(m, nn.modules.batchnorm._BatchNorm)
    )
    found["alive"] = float(before[0].std()) > 0
    if kept and not normed:
        expected = silenced(model, kept, x)
        scale = max(float(e.abs().max()) for e in expected)
        error = max(float((a - e).abs().max()) for a, e in zip(after, expected, strict=True))
        found["error"] = error / max(scale, 1e-12)
    small.train()
    loss = sum(
        o.float().square().mean()
        for o in tree_leaves(small(torch.cat([x, x])))
        if isinstance(o, Tensor)
    )
    loss.backward()
    used = [p for p in small.parameters() if p.grad is not None]
    found["backward"] = all(p.grad.shape == p.shape for p in used) and bool(used)
    small.eval()
    copied = copy.deepcopy(small)
    copied.load_state_dict(small.state_dict())
    program = torch.export.export(copied, (x,), strict=False)
    again = [o for o in tree_leaves(program.module()(x)) if isinstance(o, Tensor)]
    near = [
        torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
        for a, b in zip(again, outputs(small, x), strict=True)
    ]
    found["exports"] = all(near)
    return found


def main() -> None:
    """Prune, check, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=["torchvision", "timm"])
    parser.add_argument("name")
    parser.add_argument("--tool", choices=TOOLS, default="slimkit")
    parser.add_argument("--target", type=float, default=0.5, help="fraction of the MACs to keep")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, x = build(given.library, given.name)
    dense = macs(model, x)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row: dict[str, Any] = {"library": given.library, "name": given.name, "tool": given.tool}
    prune = TOOLS[given.tool]
    begin = time.perf_counter()
    try:
        small, more = prune(model, x, given.target)
        row |= {"seconds": time.perf_counter() - begin, **more}
        row["peak_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
        row["macs"] = macs(small, x) / dense
        row["params"] = sum(p.numel() for p in small.parameters()) / sum(
            p.numel() for p in model.parameters()
        )
        kept = small.slimkit_pruning.kept if given.tool == "slimkit" else None
        row |= checked(model, small, x, kept)
    except Exception as error:
        row |= {"seconds": time.perf_counter() - begin}
        row["failure"] = (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    print(json.dumps(row))


if __name__ == "__main__":
    main()
