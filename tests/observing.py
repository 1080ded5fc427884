"""Shows values to a quantizer, for the tests of quantizers."""

from __future__ import annotations

import torch


def observed(quantizer, *batches):
    for batch in batches:
        quantizer.observe(torch.as_tensor(batch))
    return quantizer
