"""Whether what was trained is still made of numbers."""

from __future__ import annotations

from torch import nn

from slimkit.errors import DivergedError
from slimkit.weights import sick


def check_finite(module: nn.Module, when: str) -> None:
    """Refuse weights that hold NaN or infinity.

    Args:
        module: whose parameters are looked at.
        when: for the message, such as ``after epoch 3``.

    Raises:
        DivergedError: the first of them is named.
    """
    name = sick(module).removeprefix("inner.")
    if name:
        raise DivergedError(
            f"the training diverged: {name} holds NaN or infinity {when}; lower the learning rate, "
            "clip gradients (trainer.gradient_clip_val), or look at the loss"
        )
