"""Lets several teachers count for a sample as much as its label proves them right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from slimkit.errors import SlimkitError
from slimkit.training.teacher_cache import Given


def confidence(
    given: Sequence[Given], place: str, labels: Tensor, shares: Sequence[float]
) -> Tensor:
    """How much each teacher counts for each sample, shape (teachers, batch); sums to 1.

    Those with the smaller cross-entropy of the label count more: one minus the softmax of the
    cross-entropies, as in Zhang et al. 2022, Confidence-Aware Multi-Teacher Knowledge Distillation,
    https://arxiv.org/abs/2201.00007, times the teacher's share.

    Args:
        given: of each teacher, with logits (batch, classes) at `place`.
        place: where the logits are.
        labels: (batch,).
        shares: of each teacher.

    Raises:
        SlimkitError: these are no logits of the same classes as the labels.
    """
    errors = []
    labels = labels.to(given[0][place].device)
    for tensors in given:
        logits = tensors[place].float()
        if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise SlimkitError(
                "distill.weighting: confidence needs logits (batch, classes) at the first loss's "
                f"place, {place!r}, and one label a sample; these are {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}"
            )
        errors.append(functional.cross_entropy(logits, labels.long(), reduction="none"))
    sure = 1 - torch.stack(errors).softmax(0)  # (teachers, batch)
    shared = sure * torch.tensor(shares, device=sure.device)[:, None]
    return shared / shared.sum(0)


def mixed(given: Sequence[Given], weights: Tensor) -> Given:
    """What several teachers give, averaged sample by sample with `weights` (teachers, batch).

    Raises:
        SlimkitError: they give tensors of other shapes.
    """
    result = {}
    for place in given[0]:
        tensors = [tensors[place].float() for tensors in given]
        if len({t.shape for t in tensors}) > 1 or len(tensors[0]) != weights.shape[1]:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
            raise SlimkitError(
                f"distill.weighting: confidence averages what the teachers give, but at {place!r} "
                f"they give {shapes}: name places of the same shape, or leave 'weighting' out"
            )
        shape = [len(tensors), -1, *[1] * (tensors[0].dim() - 1)]
        result[place] = (torch.stack(tensors) * weights.reshape(shape)).sum(0)
    return result
