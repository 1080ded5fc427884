"""Whether what was trained is still made of numbers."""

from __future__ import annotations

import torch
from torch import nn

from slimkit.errors import DivergedError


def check_finite(module: nn.Module, when: str) -> None:
    """Refuse weights that hold NaN or infinity; buffers, such as masks, may.

    Args:
        module: whose parameters are looked at.
        when: for the message, such as ``after epoch 3``.

    Raises:
        DivergedError: the first of them is named.
    """
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter.detach()).all():
            raise DivergedError(
                f"the training diverged: {name.removeprefix('inner.')} holds NaN or infinity "
                f"{when}; lower the learning rate, clip gradients (trainer.gradient_clip_val), or "
                "look at the loss"
            )
