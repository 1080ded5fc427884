"""How far to prune: a cost to reach, a fraction to remove, or an importance to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from slimkit.errors import PruningError

COSTS = ("flops", "params", "size_mb")
MEASURES = ("flops", "params", "ratio", "size_mb", "importance")


@dataclass(frozen=True)
class Target:
    """What a pruned model should cost, lose or keep.

    Args:
        measure: ``flops`` (multiply-accumulates left) or ``params`` (parameters left), both as a
            fraction of the dense model in (0, 1); ``size_mb``, the MiB left of all parameters and
            buffers; ``ratio``, the fraction of channels removed from every group, in (0, 1); or
            ``importance``, the share of its scores' sum that every group keeps, in (0, 1).
        value: the fraction, or MiB.
    """

    measure: str
    value: float

    @classmethod
    def of(cls, target: Mapping[str, float]) -> Target:
        """Read ``{"flops": 0.5}`` and its like.

        Raises:
            PruningError: not exactly one known measure, or a value out of its range.
        """
        if not isinstance(target, Mapping):
            raise PruningError(f'target must be such as {{"flops": 0.5}}, not {target!r}')
        given = {name: value for name, value in target.items() if value is not None}
        if len(given) != 1 or next(iter(given)) not in MEASURES:
            raise PruningError(
                f"target must name exactly one of {', '.join(MEASURES)}, such as "
                f'{{"flops": 0.5}}; got {dict(target)!r}'
            )
        measure, value = next(iter(given.items()))
        most, what = (math.inf, "above 0") if measure == "size_mb" else (1, "between 0 and 1")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
            raise PruningError(f"target.{measure} must be a number {what}, not {value!r}")
        return cls(measure, float(value))

    def __str__(self) -> str:
        return f"{{{self.measure}: {self.value:g}}}"

    def left(self, dense: float = 1.0) -> float:
        """The fraction that is left of the dense model's figure, which is `dense`."""
        return 1 - self.value if self.measure == "ratio" else min(1.0, self.value / dense)

    def milder(self, progress: float, dense: float = 1.0) -> Target:
        """The target after `progress` (0 to 1) of the way from the dense model.

        Args:
            progress: 0 leaves the model whole.
            dense: the dense model's figure in the unit of `value`.
        """
        if self.measure == "ratio":
            return Target(self.measure, self.value * progress)
        return Target(self.measure, dense - (dense - self.value) * progress)
