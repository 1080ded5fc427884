"""What a cut did to a model: stays with the model and goes into its artifact."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from slimkit.pruning.removal import Attributes, Kept


@dataclass(frozen=True)
class PruningReport:
    """What was removed from a model, and what stayed whole and why.

    Args:
        groups: group name to (channels before, channels after, coupled layers).
        frozen: group name to the reason why it was left whole.
        macs: multiply-accumulates before and after, measured.
        parameters: parameters before and after, measured.
        size_mb: MiB of all parameters and buffers before and after, measured.
        kept: the positions that remain in each tensor of the model as its function builds it.
        attributes: whole numbers in the user's modules that follow the sizes (``num_heads``).
        weights: parameter name to (its weights, those that live) where single weights are zero.
        criteria: what `slimkit.prune` scored the channels by, as a recipe names it.
    """

    groups: dict[str, tuple[int, int, list[str]]]
    frozen: dict[str, str]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    size_mb: tuple[float, float]
    kept: Kept = field(repr=False)
    attributes: Attributes = field(default_factory=dict)
    weights: dict[str, tuple[int, int]] = field(default_factory=dict)
    criteria: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the kept positions."""
        groups = {
            name: {"channels": before, "kept": after, "layers": layers}
            for name, (before, after, layers) in self.groups.items()
        }
        return {
            "macs": {"before": self.macs[0], "after": self.macs[1]},
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "size_mb": {"before": self.size_mb[0], "after": self.size_mb[1]},
            "groups": groups,
            "attributes": self.attributes,
            "weights": {n: {"weights": a, "kept": b} for n, (a, b) in self.weights.items()},
            "left_whole": self.frozen,
        }

    def __str__(self) -> str:
        """A table for people."""
        lines = [
            f"MACs        {self.macs[0]:>14,} -> {self.macs[1]:>14,}  "
            f"({self.macs[1] / max(1, self.macs[0]):.1%})",
            f"parameters  {self.parameters[0]:>14,} -> {self.parameters[1]:>14,}  "
            f"({self.parameters[1] / max(1, self.parameters[0]):.1%})",
            f"MiB         {self.size_mb[0]:>14,.2f} -> {self.size_mb[1]:>14,.2f}  "
            f"({self.size_mb[1] / max(1e-9, self.size_mb[0]):.1%})",
        ]
        for name, (before, after, layers) in self.groups.items():
            coupled = f"  with {', '.join(layers[1:4])}" if len(layers) > 1 else ""
            more = f" and {len(layers) - 4} more" if len(layers) > 4 else ""
            lines.append(f"{name:<32} {before:>5} -> {after:>5} channels{coupled}{more}")
        if self.weights:
            lines.append("zero weights are computed and stored like others: no faster, no smaller")
        for name, (before, after) in self.weights.items():
            lines.append(f"{name:<32} {1 - after / before:>6.1%} of {before:,} weights are zero")
        for path, numbers in self.attributes.items():
            said = ", ".join(f"{name} = {number}" for name, number in numbers.items())
            lines.append(f"{path or 'the model':<32} set to {said}")
        lines += [f"{name:<32} left whole: {reason}" for name, reason in self.frozen.items()]
        return "\n".join(lines)
