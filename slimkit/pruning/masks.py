"""Keeps pruned channels at zero while the model trains on, until they are cut out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slimkit.pruning.coupling import Coupling


class Masks:
    """Which channels of each group still live.

    Args:
        coupling: the groups.
        kept: group name to channel numbers that live; left out, all do.
    """

    def __init__(self, coupling: Coupling, kept: Mapping[str, Tensor] | None = None) -> None:
        self.coupling = coupling
        self.kept = {g.name: torch.arange(g.channels) for g in coupling.groups}
        self.kept.update(kept or {})

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Zero the dead channels in all parameters of all coupled layers (not in statistics)."""
        tensors = dict(model.named_parameters(remove_duplicate=False))
        for group in self.coupling.groups:
            kept = self.kept[group.name]
            if len(kept) == group.channels:
                continue
            dead = torch.ones(group.channels + 1, dtype=torch.bool)
            dead[kept] = False
            dead[-1] = False
            for member in group.members:
                tensor = tensors.get(member.tensor)
                if tensor is not None:
                    positions = dead[member.channel].nonzero().flatten().to(tensor.device)
                    tensor.index_fill_(member.dim, positions, 0.0)

    def silence(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scores with dead channels below every living one, so that none comes back."""
        silenced = {}
        for group in self.coupling.groups:
            score = scores[group.name].clone()
            dead = torch.ones(group.channels, dtype=torch.bool)
            dead[self.kept[group.name]] = False
            score[dead] = -1.0
            silenced[group.name] = score
        return silenced
