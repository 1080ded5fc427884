"""How much is pruned while the window of the recipe passes."""

from __future__ import annotations

from typing import Literal

Schedule = Literal["cubic", "linear", "iterative", "one-shot"]


def amount(schedule: Schedule, passed: float, left: float) -> float:
    """The share, 0 to 1, of all that will be pruned that is gone after a part of the window.

    Args:
        schedule: ``cubic`` (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878) prunes most of it
            early; ``linear`` evenly; ``iterative`` the same fraction of what is left at each step,
            so that what is left falls exponentially to `left`; ``one-shot`` all at the end.
        passed: the part of the window that has passed, 0 to 1.
        left: the fraction of the dense model that the target leaves, in (0, 1].

    >>> [round(1 - amount("iterative", step / 3, left=0.125) * 0.875, 6) for step in range(4)]
    [1.0, 0.5, 0.25, 0.125]
    >>> amount("cubic", 0.5, 0.5), amount("linear", 0.5, 0.5), amount("one-shot", 0.5, 0.5)
    (0.875, 0.5, 0.0)
    """
    if schedule == "one-shot":
        return float(passed >= 1)
    if schedule == "cubic":
        return 1 - (1 - passed) ** 3
    if schedule == "linear" or left >= 1:
        return passed
    return (1 - max(left, 1e-9) ** passed) / (1 - left)
