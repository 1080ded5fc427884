"""Convolutions that pad as TensorFlow does."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class SamePad(nn.Conv2d):
    """A k x k convolution padded as TensorFlow's "same" for even image sizes, k = 1 or 3.

    With stride 2 the border is on the right and at the bottom alone, with stride 1 all around.
    """

    def __init__(
        self, inputs: int, outputs: int, k: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        around = k // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, k, stride, around, groups=groups, bias=bias)
        self.behind = k // 2 if stride == 2 else 0

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        if self.behind:
            x = functional.pad(x, (0, self.behind, 0, self.behind))
        return super().forward(x)
