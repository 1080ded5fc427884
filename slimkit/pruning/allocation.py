"""Shares a cost out over groups such that the predicted loss grows least."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence

Sizes = dict[str, int]
Cost = Callable[[Mapping[str, int]], float]
Loss = Callable[[str, int], float]

ROUNDS = 4  # of exchanges; more change nothing worth the time


def allocate(sizes: Mapping[str, Collection[int]], loss: Loss, cost: Cost, limit: float) -> Sizes:
    """The size of each group with the least sum of losses at a cost of at most `limit`.

    The step of one group that loses least for what it saves is taken until the cost is reached
    (Lagrangian in effect: Shoham and Gersho, "Efficient bit allocation for an arbitrary set of
    quantizers", 1988). Then what was taken too much is given back, and exchanges between groups
    are tried; the answer is near the best but need not be it.

    Args:
        sizes: group to the sizes that it may have.
        loss: what a group's size adds to the loss; falls with the size.
        cost: of all groups' sizes; rises with each.
        limit: must be reachable with the smallest sizes.

    >>> losses = {"a": {4: 0.0, 2: 1.0}, "b": {4: 0.0, 2: 0.5, 1: 3.0}}
    >>> sizes = {name: list(curve) for name, curve in losses.items()}
    >>> allocate(sizes, lambda g, n: losses[g][n], lambda s: s["a"] + s["b"], 6)
    {'a': 4, 'b': 2}
    """
    steps = {group: sorted(set(own)) for group, own in sizes.items()}
    found = _descended(steps, loss, cost, limit)
    _give_back_(found, steps, loss, cost, limit)
    best = sum(loss(*one) for one in found.items())
    for _ in range(ROUNDS):
        before = best
        for group in steps:
            for size in [n for n in steps[group] if n < found[group]][::-1][:3]:
                other = found | {group: size}
                _give_back_(other, steps, loss, cost, limit, spare=group)
                total = sum(loss(*one) for one in other.items())
                if total < best - 1e-12:
                    found, best = other, total
        if best == before:
            break
    return found


def _descended(steps: Mapping[str, Sequence[int]], loss: Loss, cost: Cost, limit: float) -> Sizes:
    """From the largest sizes down, always by the step that costs the least loss for its saving.

    What a step saves can only shrink while other groups do: one that is still the cheapest when it
    is looked at again is the cheapest of all.
    """
    found = {group: own[-1] for group, own in steps.items()}
    now = cost(found)

    def price(group: str, size: int) -> float:
        saved = min(now - cost(found | {group: size}), now - limit)
        lost = loss(group, size) - loss(group, found[group])
        return max(0.0, lost) / saved if saved > 0 else float("inf")

    heap: list[tuple[float, str, int]] = []

    def offer(group: str) -> None:
        for size in steps[group]:
            if size < found[group]:
                heapq.heappush(heap, (price(group, size), group, size))

    for group in steps if now > limit else ():
        offer(group)
    while now > limit and heap:
        _, group, size = heapq.heappop(heap)
        if size >= found[group]:
            continue
        fresh = price(group, size)
        if heap and fresh > heap[0][0]:
            heapq.heappush(heap, (fresh, group, size))
            continue
        found[group] = size
        now = cost(found)
        offer(group)
    return found


def _give_back_(
    found: Sizes,
    steps: Mapping[str, Sequence[int]],
    loss: Loss,
    cost: Cost,
    limit: float,
    spare: str = "",
) -> None:
    """Let groups grow, the one first that the loss gains most from, as long as the cost allows."""
    stuck = {spare}
    while len(stuck) < len(steps) + (spare not in steps):
        gains: list[tuple[float, str, int]] = []
        for group in steps.keys() - stuck:
            larger = [n for n in steps[group] if n > found[group]]

            def too_much(size: int, group: str = group) -> bool:
                return cost(found | {group: size}) > limit

            too_many = bisect_left(larger, True, key=too_much)
            if not too_many:
                stuck.add(group)
                continue
            most = larger[too_many - 1]
            gains.append((loss(group, found[group]) - loss(group, most), group, most))
        if not gains:
            return
        _, group, size = max(gains)
        found[group] = size
        stuck.add(group)
