"""`rewrite`: the same function in operations that a target likes better, or nearly the same."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimkit.acceptance import check_module
from slimkit.batches import as_inputs, inputs_of
from slimkit.copies import copied
from slimkit.errors import RewritingError
from slimkit.evaluating import eagerly, evaluating, untouched
from slimkit.quantization.fake import QuantizedModel
from slimkit.rewriting.changes import Change, apply_
from slimkit.rewriting.exactness import Noise, difference, outputs
from slimkit.rewriting.found import Found
from slimkit.rewriting.known import Known, known
from slimkit.rewriting.report import RewritingReport, Rewritten
from slimkit.validation import fit, option_types

Choice = str | Mapping[str, Any]
"""A rewrite's name, or ``{"name": ..., "options": {...}}``."""

Evaluate = Callable[[nn.Module], float]


def rewrite(
    model: nn.Module,
    example_inputs: Any,
    rewrites: str | Sequence[Choice],
    *,
    data: Iterable[Any] | None = None,
    evaluate: Evaluate | None = None,
    batches: int = 8,
) -> nn.Module:
    """A copy of `model` that computes the same in other operations; yours is not changed.

    Args:
        model: a float model that is not pruned yet.
        example_inputs: a tensor, or a tuple of the forward's arguments.
        rewrites: names, or mappings with ``name`` and ``options``, applied in order
            (docs/rewriting.md lists them).
        data: batches, with or without labels, to measure on what approximate ones cost; left out,
            the example inputs.
        evaluate: the task's metric of a module, measured before and after approximate ones.
        batches: how many of `data`.

    Returns:
        A module of the same class; ``print(module.slimkit_rewriting)`` says what was changed and
        what it costs.

    Raises:
        RewritingError: a rewrite is unknown, finds nothing to do, or an exact one changes the
            outputs by more than float rounding explains.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU())
        >>> fast = rewrite(net, torch.randn(4, 8), ["silu-to-hardswish"])
        >>> fast[1], fast.slimkit_rewriting.done[0].places
        (Hardswish(), 1)
    """
    check_module(model, "rewrite")
    inputs = as_inputs(example_inputs)
    own = copied(model)
    with eagerly(own), untouched(model):
        rewrite_(own, inputs, rewrites, data=data, evaluate=evaluate, batches=batches)
    return own


@torch.no_grad()
def rewrite_(
    model: nn.Module,
    inputs: tuple[Any, ...],
    rewrites: str | Sequence[Choice],
    *,
    data: Iterable[Any] | None = None,
    evaluate: Evaluate | None = None,
    batches: int = 8,
) -> RewritingReport:
    """The same in place; see `rewrite`. The report is also left at ``model.slimkit_rewriting``."""
    _check(model)
    chosen = [_chosen(one) for one in ([rewrites] if isinstance(rewrites, str) else rewrites)]
    if not chosen:
        raise RewritingError("no rewrite is named; see docs/rewriting.md")
    measured = [inputs] if data is None else _taken(data, model, batches)
    earlier: RewritingReport | None = getattr(model, "slimkit_rewriting", None)
    done = list(earlier.done) if earlier else []
    now = copied(model)  # the user's stays whole until all of them hold
    metric: float | None = None
    for record, options in chosen:
        one = _found(record, now, inputs, options)
        if record.exact:
            reason = difference(now, inputs, one.changes)
            if reason:
                raise RewritingError(
                    f"{record.name} is exact, but of {type(model).__name__} {reason}. Leave it out "
                    "of the recipe; a forward that draws random numbers in evaluation cannot be "
                    "verified"
                )
            apply_(now, one.changes)
        else:
            if metric is None and evaluate is not None:
                metric = _evaluated(evaluate, now)
            one = _measured(one, now, measured)
            if evaluate is not None and metric is not None:
                after = _evaluated(evaluate, now)
                one, metric = replace(one, metric=(metric, after)), after
        done.append(one)
    report = RewritingReport(tuple(done))
    apply_(model, report.changes[len(earlier.changes) if earlier else 0 :])
    model.slimkit_rewriting = report  # type: ignore[assignment]  # a plain attribute
    return report


def _check(model: nn.Module) -> None:
    if isinstance(model, QuantizedModel):
        raise RewritingError("the model is quantized: rewrite it first, then quantize the result")
    if getattr(model, "slimkit_pruning", None) is not None:
        raise RewritingError("the model is pruned: rewrite it first, then prune the result")


def _chosen(choice: Choice) -> tuple[Known, dict[str, Any]]:
    """The record and the options of one choice."""
    name = choice if isinstance(choice, str) else choice["name"]
    options = {} if isinstance(choice, str) else dict(choice.get("options") or {})
    record = known(name)
    types, _ = option_types(_function(record))
    good, problems = fit(options, types)
    if problems:
        raise RewritingError(f"{name}: " + "; ".join(map(str, problems)))
    return record, good


def _function(record: Known) -> Any:
    module, _, name = record.target.partition(":")
    return getattr(importlib.import_module(module), name)


def _found(
    record: Known, model: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]
) -> Rewritten:
    """What the rewrite would change.

    Raises:
        RewritingError: nothing.
    """
    found: Found = _function(record)(model, inputs, **options)
    if not found.changes:
        reasons = [f"{where or 'the model'}: {why}" for where, why in found.left.items()]
        why = f" ({'; '.join(reasons[:5])})" if reasons else ""
        raise RewritingError(
            f"{record.name} found nothing to do in {type(model).__name__}{why}; leave it out. "
            f"What it does: {record.summary}"
        )
    changes: tuple[Change, ...] = tuple(found.changes)
    return Rewritten(record.name, record.exact, changes, found.left, options)


def _measured(one: Rewritten, model: nn.Module, measured: Sequence[tuple[Any, ...]]) -> Rewritten:
    """Apply an approximate rewrite in place, and say how far the outputs are off."""
    noise, samples = Noise(), 0
    before = copied(model)
    apply_(model, one.changes)
    for given in measured:
        noise.add(outputs(before, given), outputs(model, given))
        samples += _samples(given)
    return replace(one, sqnr_db=noise.sqnr_db, samples=samples)


def _evaluated(evaluate: Evaluate, model: nn.Module) -> float:
    with evaluating(model):
        return float(evaluate(model))


def _taken(data: Iterable[Any], model: nn.Module, batches: int) -> list[tuple[Any, ...]]:
    taken: list[tuple[Any, ...]] = []
    for batch in data:
        if len(taken) == batches:
            break
        taken.append(inputs_of(batch, model))
    if not taken:
        raise RewritingError("the data is empty: it gave no batch to measure a rewrite's cost on")
    return taken


def _samples(inputs: tuple[Any, ...]) -> int:
    sizes = [len(t) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()]
    return sizes[0] if sizes else 1
