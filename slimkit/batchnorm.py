"""Re-estimates batch-norm statistics, which no longer fit after the network in front changed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimkit.batches import Inputs, inputs_of
from slimkit.evaluating import evaluating


@torch.no_grad()
def reestimate_(
    model: nn.Module, batches: Iterable[Any], count: int, inputs: Inputs = inputs_of
) -> int:
    """Replace running mean and variance by their averages over `count` batches.

    Other layers stay in evaluation mode (no dropout). Returns the number of batches used; a model
    without batch-norm, or no data, leaves everything as it is and returns 0. A batch-norm that the
    forward does not reach keeps its statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms or count == 0:
        return 0
    momenta = {norm: norm.momentum for norm in norms}
    before = {norm: {k: b.clone() for k, b in norm.named_buffers()} for norm in norms}
    used, done = 0, False
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over the batches
                norm.train()
            for batch in islice(batches, count):
                model(*inputs(batch, model))
                used += 1
        done = used > 0
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
            if not (done and norm.num_batches_tracked):
                norm.load_state_dict(before[norm], strict=False)
    return used
