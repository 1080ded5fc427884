"""Small quantized programs, written by hand with the operators that slimkit's export emits."""

from __future__ import annotations

from functools import cache

import torch
import torch.ao.quantization.fx._decomposed  # noqa: F401  (registers the operators below)
import torch.nn.functional as F
from torch import Tensor, nn

from slimkit.builtin.backends.onnxruntime import OnnxRuntime
from slimkit.interfaces import Deployable, tensors_of

qd = torch.ops.quantized_decomposed


class Round(nn.Module):
    """An activation that passes through integers; covers what it saw while calibrating."""

    def __init__(self, symmetric: bool = False) -> None:
        super().__init__()
        self.symmetric, self.lo, self.hi, self.mode = symmetric, 0.0, 0.0, "calibrate"

    @property
    def scale(self) -> float:
        return max(-self.lo, self.hi) / 127 if self.symmetric else (self.hi - self.lo) / 255

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "calibrate":
            self.lo, self.hi = min(self.lo, float(x.min())), max(self.hi, float(x.max()))
        if self.mode != "round":
            return x
        grid = (self.scale, 0, -127, 127, torch.int8)
        if not self.symmetric:
            grid = (self.scale, round(-self.lo / self.scale), 0, 255, torch.uint8)
        return qd.dequantize_per_tensor(qd.quantize_per_tensor(x, *grid), *grid)


class Layer(nn.Module):
    """A conv2d, or linear layer if its shape is (out, in); its weight is int8 once frozen.

    The bias is an integer too if the rounding that it `reads` is given, as in ONNX Runtime; the
    weight is then as wide as that sums rightly on this processor.
    """

    def __init__(
        self, *shape: int, bias: bool = True, reads: Round | None = None, **conv: object
    ) -> None:
        super().__init__()
        seed = torch.Generator().manual_seed(sum(shape) * 7 + len(shape))
        fan_in = torch.Size(shape[1:]).numel()
        self.weight = nn.Parameter(torch.randn(shape, generator=seed) * (2 / fan_in) ** 0.5)
        self.bias = nn.Parameter(torch.randn(shape[0], generator=seed) / 5) if bias else None
        self.reads, self.conv, self.frozen = (reads,), conv, False

    def freeze(self) -> None:
        w, (reads,) = self.weight.detach(), self.reads
        bits = None if reads is None else OnnxRuntime().weight_bits()
        scale = w.flatten(1).abs().amax(1) / (2 ** ((bits or 8) - 1) - 1)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int64))
        integers = (w.flatten(1) / scale[:, None]).round().to(torch.int8)
        self.register_buffer("w", integers.reshape(w.shape))
        if self.bias is not None and reads is not None:
            self.register_buffer("bias_scale", scale * reads.scale)
            integers = (self.bias.detach() / self.bias_scale).round().to(torch.int32)
            self.register_buffer("b", integers)
        self.frozen = True

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight, self.bias
        if self.frozen:
            w = qd.dequantize_per_channel(self.w, self.scale, self.zero, 0, -127, 127, torch.int8)
            if hasattr(self, "b"):
                grid = (self.zero, 0, -(2**31), 2**31 - 1, torch.int32)
                b = qd.dequantize_per_channel(self.b, self.bias_scale, *grid)
        return F.linear(x, w, b) if w.dim() == 2 else F.conv2d(x, w, b, **self.conv)


def deployable(net: nn.Module, *example: Tensor, quantized: bool = True) -> Deployable:
    """Calibrate `net` on the example, round it unless it shall stay float, and export it."""
    net.eval()
    with torch.no_grad():
        net(*example)
    for module in net.modules():
        if isinstance(module, Round):
            module.mode = "round" if quantized else "float"
        if isinstance(module, Layer) and quantized:
            module.freeze()
    return Deployable(torch.export.export(net, example, strict=False), example, quantized)


@cache
def _module(program: torch.export.ExportedProgram) -> nn.Module:
    return program.module()


def simulate(deployed: Deployable, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = _module(deployed.program)(*inputs)
    return tensors_of(out)
