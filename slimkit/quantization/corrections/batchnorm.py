"""Batch-norm re-estimation: statistics follow what rounding does to means and variances."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimkit.batchnorm import reestimate_
from slimkit.calls import trace
from slimkit.copies import copied
from slimkit.quantization.corrections.places import rounded_places
from slimkit.quantization.fake import FakeQuantization

MOST = 4.0
"""No variance is changed by more than this factor: a channel that is silent in float has none."""


@torch.no_grad()
def batchnorm_(
    model: nn.Module,
    reference: nn.Module,
    fake: FakeQuantization,
    batches: Sequence[tuple[Any, ...]],
) -> dict[str, str]:
    """Move running means and variances by what rounding changes in them on `batches`.

    Sun et al. 2019, Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural
    Networks (NeurIPS), put the statistics of the rounded network itself there. Here the same is
    estimated in float too and only the difference is taken over: calibration data is rarely what
    the network was trained on (no augmentation, few samples), and what that changes is no error.

    Args:
        model: its batch-norms' statistics are changed.
        reference: the same model in float.
        fake: rounds.
        batches: the forward's arguments, one tuple a batch.

    Returns:
        Layer -> why it was left out.
    """
    found = rounded_places(trace(model, batches[0]), fake.sites)
    skipped = {p.layer: "it has no batch-norm behind it" for p in found if p.norm is None}
    if len(skipped) == len(found):
        return skipped
    estimated = []
    for network, rounded in ((reference, False), (model, True)):
        own = copied(network)
        with fake.active(own) if rounded else nullcontext():
            reestimate_(own, [(inputs,) for inputs in batches], len(batches))
        estimated.append(dict(own.named_modules()))
    before, after = estimated
    for name, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        was, now = before[name], after[name]
        assert norm.running_var is not None
        norm.running_mean += now.running_mean - was.running_mean
        tiny = torch.finfo(torch.float32).tiny
        factor = (now.running_var + tiny) / (was.running_var + tiny)
        norm.running_var *= factor.clamp(1 / MOST, MOST)
    return skipped
