"""Mixed precision: leaves the fewest places in float that keep a network's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from slimkit.calls import trace
from slimkit.copies import copied
from slimkit.errors import QuantizationError
from slimkit.quantization.fake import QuantizedModel
from slimkit.quantization.sensitivity import Sensitivity, rank
from slimkit.quantization.sites import find_sites

HARMFUL_DB = 20.0
"""A place whose rounding alone adds noise of 1 % of the signal's power stays in float."""

Evaluate = Callable[[nn.Module], float]


def without(
    quantized: QuantizedModel, calls: Sequence[str], inputs: tuple[Any, ...]
) -> QuantizedModel:
    """The same model and ranges with `calls` in float as well; `quantized` is not changed.

    Args:
        quantized: calibrated.
        calls: names of calls, as `Sensitivity.calls` has them.
        inputs: the forward's arguments, to trace the model with.

    Raises:
        QuantizationError: nothing would be left to quantize, or a place appears that was never
            calibrated.
    """
    old = quantized.fake
    kept = [name for name in old.sites.skipped if name not in calls]
    sites = find_sites(trace(quantized.model, inputs), old.scheme, [*kept, *calls])
    if not sites.weights and not sites.activations:
        raise QuantizationError("nothing would be left in integers")
    new = set(sites.activations) - set(old.sites.activations)
    if new:
        raise QuantizationError(f"{', '.join(sorted(new))} was not calibrated")
    for name in sites.skipped:
        sites.skipped[name] = (
            "its rounding harms the outputs" if name in calls else old.sites.skipped[name]
        )
    fake = copied(old)
    fake.sites = sites
    fake.keep_only_(sites)
    result = QuantizedModel(quantized.model, fake, quantized.backend, quantized.choices)
    result.corrections = quantized.corrections
    result.training = quantized.training
    return result


def fewest_in_float(
    quantized: QuantizedModel,
    batches: Sequence[tuple[Any, ...]],
    *,
    evaluate: Evaluate | None = None,
    least: float | None = None,
    ranking: Sequence[Sensitivity] | None = None,
) -> tuple[QuantizedModel, list[Sensitivity]]:
    """Leave the most harmful places in float, as few as possible.

    With `evaluate` they are as many of the ranking's first as it takes to reach `least`, found by
    bisection; without it they are those that alone add noise of over 1 % of the signal's power.

    Args:
        quantized: calibrated; not changed.
        batches: the forward's arguments to rank the places on, one tuple a batch.
        evaluate: the task's metric of a model; larger is better.
        least: what it must reach.
        ranking: what `rank` found for `quantized` before; left out, it is found here.

    Returns:
        The mixed model and the places left in float; `quantized` and none where that is enough.

    Raises:
        QuantizationError: `least` is not reached before nothing is left in integers.
    """
    if evaluate is not None and least is not None and evaluate(quantized) >= least:
        return quantized, []
    found = list(ranking) if ranking is not None else rank(quantized, batches)
    if evaluate is None or least is None:
        harmful = [one for one in found if one.sqnr_db < HARMFUL_DB]
        return (_mixed(quantized, harmful, batches[0]), harmful) if harmful else (quantized, [])
    low, high, best = 0, 1, None
    while best is None:  # double until it is enough: most networks need few
        high = min(high, len(found))
        try:
            candidate = _mixed(quantized, found[:high], batches[0])
        except QuantizationError as error:  # nothing is left in integers
            raise QuantizationError(
                f"the metric does not reach {least:.4f} with the {low} most harmful of "
                f"{len(found)} places in float, and with {high} {error}; choose other quantizers"
            ) from error
        if evaluate(candidate) >= least:
            best = candidate
        elif high == len(found):
            raise QuantizationError(
                f"the metric does not reach {least:.4f} with all {high} places in float"
            )
        else:
            low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        candidate = _mixed(quantized, found[:middle], batches[0])
        if evaluate(candidate) >= least:
            best, high = candidate, middle
        else:
            low = middle
    return best, found[:high]


def _mixed(
    quantized: QuantizedModel, places: Sequence[Sensitivity], inputs: tuple[Any, ...]
) -> QuantizedModel:
    calls = dict.fromkeys(name for one in places for name in one.calls)
    return without(quantized, list(calls), inputs)
