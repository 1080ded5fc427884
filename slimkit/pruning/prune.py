"""`prune`: a smaller copy of a model, verified before it is cut and measured afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimkit.acceptance import check_module, check_repeats
from slimkit.batches import as_inputs, finite, inputs_of
from slimkit.batchnorm import reestimate_
from slimkit.copies import copied
from slimkit.errors import PruningError, in_one_line
from slimkit.evaluating import eagerly, untouched
from slimkit.interfaces import Backend, Criterion
from slimkit.pruning.cost import counted, macs, parameters, size_mb
from slimkit.pruning.coupling import Attention, Coupling
from slimkit.pruning.engines import Engine, find_groups
from slimkit.pruning.granularity import Fine
from slimkit.pruning.patterns import check_pattern, covers
from slimkit.pruning.rankings import Ranking
from slimkit.pruning.removal import (
    compose,
    fitted,
    kept_positions,
    merged,
    remove_,
    rescale_,
)
from slimkit.pruning.report import PruningReport
from slimkit.pruning.scores import DATA, Loss, scores_over_batches
from slimkit.pruning.selection import Selector
from slimkit.pruning.sparsity import ratio_of, zero_
from slimkit.pruning.statistics import MEASURED
from slimkit.pruning.targets import COSTS, Target
from slimkit.pruning.verification import verified
from slimkit.registry import discover

TRIES = 6
CLOSE = 0.01  # of the dense cost: how near the measured figure must come to the target


def analyse(
    model: nn.Module,
    inputs: tuple[Any, ...],
    protect: Sequence[str] = (),
    engine: Engine = "slimkit",
    attention: Attention = "dimensions",
) -> Coupling:
    """The groups of `model` that may be cut, each verified; the rest frozen with its reason.

    Raises:
        PruningError: the model cannot be traced, a `protect` pattern matches nothing, or a
            parameter or input holds NaN or infinity.
    """
    broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    broken += [name for name, b in model.named_buffers() if torch.isnan(b).any()]
    if broken:
        raise PruningError(f"{broken[0]} holds NaN or infinity; prune a model that works")
    if not finite(inputs):
        raise PruningError("example_inputs hold NaN or infinity")
    check_repeats(model, inputs)
    coupling = find_groups(model, inputs, engine, attention)
    frozen = dict(coupling.frozen)
    groups = list(coupling.groups)
    for pattern in protect:
        check_pattern("protect", pattern, model)
        for group in list(groups):
            if covers(pattern, group.makers):
                groups.remove(group)
                frozen[group.name] = f"protected by {pattern!r}"
    return verified(model, Coupling(tuple(groups), frozen), inputs)


def cut_(
    model: nn.Module,
    coupling: Coupling,
    kept: Mapping[str, Tensor],
    inputs: tuple[Any, ...],
    macs_before_and_after: tuple[int, int] | None = None,
    spared: Mapping[str, str] | None = None,
) -> PruningReport:
    """Remove all channels but `kept` from `model` in place, and report what was measured.

    The report is also left at ``model.slimkit_pruning``; it composes with an earlier one.

    Args:
        model: is cut.
        coupling: its groups.
        kept: group name to the channel numbers that stay.
        inputs: the forward's arguments, to measure with.
        macs_before_and_after: what was measured already for exactly this cut.
        spared: groups that the choice left whole on purpose, with the reason.

    Raises:
        PruningError: nothing would be removed.
    """
    pairs = [(group, kept[group.name]) for group in coupling.groups]
    positions = kept_positions(pairs)
    whole = {g.name for g, stay in pairs if len(stay) == g.channels}
    left_whole = {name: why for name, why in (spared or {}).items() if name in whole}
    if not positions:
        raise PruningError(
            "nothing was pruned: no channel may go. "
            + ("; ".join(f"{n}: {r}" for n, r in list(coupling.frozen.items())[:5]) or "no group")
        )
    before = (parameters(model), size_mb(model))
    dense = macs_before_and_after[0] if macs_before_and_after else macs(model, inputs)
    earlier = getattr(model, "slimkit_pruning", None)
    attributes = fitted(pairs)
    rescale_(model, pairs)
    remove_(model, positions, attributes)
    left = macs_before_and_after[1] if macs_before_and_after else macs(model, inputs)
    report = PruningReport(
        groups={
            g.name: (g.channels, len(stay), g.layers)
            for g, stay in pairs
            if g.name not in left_whole
        },
        frozen=left_whole | coupling.frozen,
        macs=(dense, left),
        parameters=(before[0], parameters(model)),
        size_mb=(before[1], size_mb(model)),
        kept=compose(earlier.kept, positions) if earlier is not None else positions,
        attributes=merged(earlier.attributes, attributes) if earlier is not None else attributes,
    )
    model.slimkit_pruning = report  # type: ignore[assignment]  # a plain attribute, not a module
    return report


def cut_to_target_(
    model: nn.Module,
    selector: Selector,
    scores: Mapping[str, Tensor],
    target: Target | None,
    inputs: tuple[Any, ...],
) -> PruningReport:
    """Choose, cut and measure in place; corrects the choice where the prediction was off.

    Raises:
        PruningError: nothing would be removed, or the target is out of reach by prediction or by
            measurement, or the cut model does not run; the model is as it was.
    """
    coupling = selector.coupling
    if target is None or target.measure not in COSTS:
        kept = selector.choose(scores, target).kept
        return cut_(model, coupling, kept, inputs, spared=selector.spared)
    dense = selector.cost.measured_macs
    aim, found = target, None
    under, over = None, None  # (aim, reached) of the nearest tries on both sides
    for _ in range(TRIES):
        try:
            choice = selector.choose(scores, aim)
        except PruningError:
            if aim == target:
                raise
            break  # a corrected aim is nobody's target
        pairs = [(group, choice.kept[group.name]) for group in coupling.groups]
        probe = copied(model, share=True)
        remove_(probe, kept_positions(pairs), fitted(pairs))
        try:
            left = counted(probe, inputs)
        except Exception as error:
            raise PruningError(
                f"cut to target {target}, {type(model).__name__} does not run: "
                f"{in_one_line(error)}. Choose another target, or protect the layer"
            ) from error
        reached, close = _reached(target, (dense, left), selector, probe)
        if reached <= target.value + close and (found is None or reached > found[0]):
            found = reached, choice.kept, left
        off = target.value - reached
        foreseen = target.measure != "flops" or abs(left - choice.macs) <= CLOSE * dense
        if reached <= target.value + close and (off <= CLOSE or foreseen):
            break
        if off > 0:
            under = aim.value, reached
        else:
            over = aim.value, reached
        value = aim.value + off
        if under and over:  # between the two, as if the cost were a straight line
            slope = (over[0] - under[0]) / (over[1] - under[1])
            value = under[0] + slope * (target.value - under[1])
        aim = Target(target.measure, min(max(1e-3, value), _most(target)))
    if found is not None:
        return cut_(model, coupling, found[1], inputs, (dense, found[2]), selector.spared)
    raise PruningError(
        f"target {target} cannot be reached: {reached:.3f} is left by measurement, more than "
        "predicted; choose a milder target"
    )


def _most(target: Target) -> float:
    """The mildest target of the same kind."""
    return math.inf if target.measure == "size_mb" else 1 - 1e-6


def _reached(
    target: Target, measured_macs: tuple[int, int], selector: Selector, model: nn.Module
) -> tuple[float, float]:
    """The measured figure of a cut model in the target's unit, and how far it may be above it."""
    if target.measure == "size_mb":
        return size_mb(model), 0.0
    if target.measure == "params":
        return parameters(model) / max(1.0, selector.dense_parameters), CLOSE
    return measured_macs[1] / max(1, measured_macs[0]), CLOSE


def prune(
    model: nn.Module,
    example_inputs: Any,
    criterion: str | Criterion = "l1",
    *,
    target: Mapping[str, float] | None = None,
    ratios: Mapping[str, float] | None = None,
    ranking: Ranking = "global",
    max_ratio: float | Sequence[float] | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    protect: Sequence[str] = (),
    protect_first: bool = True,
    round_to: int | None = None,
    backend: str | Sequence[str] = (),
    min_channels: int = 1,
    data_batches: int = 8,
    batchnorm_batches: int = 20,
    engine: Engine = "slimkit",
    attention: Attention = "dimensions",
    granularity: Literal["channel"] | Fine = "channel",
    block_size: tuple[int, int] = (1, 4),
) -> nn.Module:
    """A pruned copy of `model`; the given model is not changed.

    Args:
        model: any module that torch.export can write down.
        example_inputs: a tensor, or a tuple of the forward's arguments.
        criterion: a plugin's name (see ``slimkit list-plugins --kind criterion``), or an instance.
        target: exactly one of ``flops`` and ``params`` (the fraction that is left, in (0, 1)),
            ``size_mb`` (the MiB left of all parameters and buffers), ``ratio`` (the fraction of
            channels removed, in (0, 1)) or ``importance`` (the share in (0, 1) of the sum of its
            scores that each group keeps, in the fewest channels that carry it). May be left out
            where `ratios` is given.
        ratios: name patterns of layers, as in `protect`, to the fraction of channels in [0, 1) that
            their groups lose whatever the target; the first pattern that covers a layer that makes
            a group's channels counts. The target decides about the other groups; without one
            they stay whole.
        ranking: what is ranked against what: ``global``, the channels of all groups together;
            ``local``, each group alone, and all lose the same fraction; ``isomorphic``, groups of
            the same structure together, and every structure loses the same fraction. With
            ``ratio``, ``global`` means ``local``; ``importance`` is always decided in each group.
        max_ratio: the largest fraction of its channels in [0, 1) that a group may lose, or two of
            them for the first and the last group of the model, with a straight line between.
            Left out, 0.95, or the target's ratio where that is more. Does not hold `ratios` back.
        data: batches, with or without labels, to re-estimate batch-norm and to take gradients
            and activations from; may be left out.
        loss: takes (model, batch) and gives the scalar to differentiate; for criteria that need
            gradients. Left out, cross-entropy on (inputs, labels).
        protect: name patterns of layers that keep all channels that they make (and so do the layers
            that share these channels); what they read may shrink. The name of a block covers the
            layers inside.
        protect_first: whether the first convolution over an image or a signal keeps its channels,
            where no residual connection shares them and the target can be reached without it.
        round_to: kept channels are a multiple of this. Left out, of what `backend` computes
            fastest, or of half of it, a quarter ... in groups of less than two multiples.
        backend: the runtimes that the model is for; see ``Backend.channel_multiple``.
        min_channels: the fewest channels of a group.
        data_batches: batches for a criterion's gradients and activations.
        batchnorm_batches: batches for batch-norm re-estimation; 0 turns it off.
        engine: what finds coupled channels: ``slimkit`` (the operations of one forward),
            ``export`` (those in the graph of torch.export) or ``torch-pruning``.
        attention: what goes in attention: ``dimensions``, each of them in all heads, or whole
            ``heads``.
        granularity: what is removed as a whole: ``channel``; or, set to zero in convolutions and
            linear layers, ``element``, single weights, ``block``, blocks of `block_size`, or
            ``2:4``, the two least of each four consecutive weights along the input dimension.
            Zero weights make files compress better; no backend here is faster for them. The
            target is then ``ratio``, the fraction of the weights that is zero, of all weights
            together or, with ``local``, of each layer; 2:4 has none. Depthwise convolutions stay
            as they are, and the first convolution where `protect_first`. Options about channels do
            not go with it.
        block_size: outputs and inputs of a block.

    Returns:
        The smaller module, of the same class; ``print(module.slimkit_pruning)`` says what went.

    Raises:
        PruningError: nothing can be pruned, the target cannot be reached, an option is out of its
            range, or a pattern matches nothing. The message says what is in the way.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(),
        ...                           torch.nn.Linear(32, 4))
        >>> small = prune(net, torch.randn(1, 8), criterion="l1", target={"flops": 0.5})
        >>> small[0].out_features, net[0].out_features
        (16, 32)
    """
    check_module(model, "prune")
    if granularity != "channel":
        about = {
            "ratios": not ratios,
            "ranking": ranking in ("global", "local"),
            "round_to": round_to is None,
            "min_channels": min_channels == 1,
            "engine": engine == "slimkit",
            "attention": attention == "dimensions",
        }
        ratio = ratio_of(
            granularity, target, [name for name, default in about.items() if not default]
        )
    elif target is None and not ratios:
        raise PruningError(
            'give a target, such as {"flops": 0.5}, or ratios, such as {"layer1": 0.3}'
        )
    aim = None if target is None else Target.of(target)
    inputs = as_inputs(example_inputs)
    multiple = channel_multiple([backend] if isinstance(backend, str) else backend)
    chosen = discover().create("criterion", criterion) if isinstance(criterion, str) else criterion
    if chosen.needs & DATA and data is None:
        activations = chosen.needs & DATA <= MEASURED
        what = "activations" if activations else "gradients"
        how = "batches of inputs" if activations else "batches of inputs and labels"
        raise PruningError(
            f"criterion {criterion!r} needs {what}: pass data= (--data on the command line) with "
            f"{how}, or choose a criterion without data such as 'l1'"
        )
    if isinstance(data, Iterator):  # it can be read once, but is needed twice
        data = list(islice(data, max(data_batches, batchnorm_batches)))
    if isinstance(model, torch.jit.ScriptModule):
        raise PruningError(
            f"{type(model).__name__} is TorchScript, whose code and sizes are fixed; prune the "
            "module that it was made from"
        )
    try:
        small = copied(model)
    except TypeError as error:
        raise PruningError(
            f"{type(model).__name__} cannot be copied: {error}. slimkit works on copies; take what "
            "cannot be copied (a lock, an open file) out of the module's attributes"
        ) from error
    batches = () if data is None else data
    with eagerly(small), untouched(model):
        if granularity != "channel":
            zero_(
                small,
                inputs,
                chosen,
                granularity,
                ratio=ratio,
                ranking=ranking,
                max_ratio=max_ratio,
                block_size=block_size,
                protect=protect,
                protect_first=protect_first,
                batches=batches,
                loss=loss or cross_entropy,
                count=data_batches,
            )
        else:
            coupling = analyse(small, inputs, protect, engine, attention)
            selector = Selector(
                small,
                coupling,
                inputs,
                round_to=round_to,
                min_channels=min_channels,
                ranking=ranking,
                max_ratio=max_ratio,
                ratios=ratios,
                multiple=multiple,
                protect_first=protect_first,
            )
            scores = scores_over_batches(
                small, coupling, chosen, batches, loss or cross_entropy, data_batches
            )
            cut_to_target_(small, selector, scores, aim, inputs)
        if data is not None:
            reestimate_(small, data, batchnorm_batches)
    earlier = getattr(model, "slimkit_pruning", None)
    criteria = (*(earlier.criteria if earlier else ()), discover().name_of("criterion", chosen))
    report: PruningReport = small.slimkit_pruning  # type: ignore[assignment]
    small.slimkit_pruning = replace(report, criteria=criteria)  # type: ignore[assignment]
    return small


def channel_multiple(backends: Iterable[str]) -> int:
    """What channel counts are a multiple of where all these runtimes are fastest; 1 for none."""
    registry = discover()
    made: list[Backend] = [registry.create("backend", name) for name in backends]
    return math.lcm(*(backend.channel_multiple for backend in made))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of ``model(inputs)`` and labels for a batch of (inputs, labels)."""
    if not (isinstance(batch, list | tuple) and len(batch) == 2):
        raise PruningError("a batch must be (inputs, labels) to take a gradient; pass loss=")
    out = model(*inputs_of(batch, model))
    return nn.functional.cross_entropy(out, batch[1].to(out.device))
