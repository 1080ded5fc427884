"""Asks a recipe's backends about its model before any training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from slimkit.batches import first_sample, samples_of, to_cpu
from slimkit.deploy.preflight import Preflight, preflight
from slimkit.errors import SlimkitError, in_one_line
from slimkit.pruning.cost import size_mb
from slimkit.recipe import Recipe
from slimkit.rewriting.rewrite import rewrite_
from slimkit.training.classification import lightning_of
from slimkit.training.copies import own_copy
from slimkit.training.deployment import Loaders, backends_of
from slimkit.training.entering import Entry
from slimkit.training.scan import trained

SAMPLES = 8
"""Of the first training batch, on which int8 finds its ranges here."""
SMALL_MB = 1.0
"""A model of so few MiB is tried in int8 in any case, which it may be too small for."""


def preflight_of(recipe: Recipe, say: Callable[[str], None]) -> list[Preflight]:
    """What each backend of `export` makes of the recipe's model, float and int8.

    The model is built and rewritten as the recipe says, its first training batch gives the shapes;
    nothing is trained, pruned or kept.

    Args:
        recipe: names model, data and backends.
        say: called with a line where the model is not the one that will be exported.

    Raises:
        SlimkitError: model or data cannot be built.
    """
    model, data = trained(recipe, say)
    inner = lightning_of(model, recipe.optimizer).cpu()
    entry = Entry(inner, recipe.network)
    batch = next(iter(Loaders(data, inner).calibration()), None)
    if batch is None:
        raise SlimkitError("the training data is empty: it gave no batch")
    inputs = samples_of(to_cpu(entry.tried(batch)), 0, SAMPLES)
    return _asked(entry.network.eval(), inputs, recipe, quantized=recipe.quantize is not None)


def refuse_untrained(
    model: nn.Module, recipe: Recipe, data: Callable[[], Any], say: Callable[[str], None]
) -> None:
    """Stop before a training whose float files a backend of `export` could not make or run.

    int8 is tried where the training will be quantization-aware, and what stands in its way is said
    only: pruning may change it. What is rounded after a training can still be chosen then. A model
    that is so small that its int8 file is no smaller is refused, since the export would refuse it.
    Where no batch can be had without a Trainer, that is said, and nothing is tried. Model and
    random numbers stay as they are.

    Args:
        model: with its weights; not changed.
        recipe: names the backends.
        data: builds the data module anew.
        say: called with one line at each step.

    Raises:
        SlimkitError: a float file that the export makes in any case is impossible, or one in int8
            would be no smaller.
    """
    say(f"trying the model on {', '.join(ref.name for ref in recipe.export)}, before any training")
    with isolate_rng():
        try:
            inner = lightning_of(own_copy(model), recipe.optimizer).cpu()
            entry = Entry(inner, recipe.network)
            batch = next(iter(Loaders(data(), inner).calibration()), None)
            given = () if batch is None else samples_of(to_cpu(entry(batch)), 0, SAMPLES)
        except Exception as error:  # data and steps may ask for a Trainer, which there is none of
            say(f"it cannot be tried before there is a Trainer: {in_one_line(error)}")
            return
        if not given:
            return  # said by the training
        network = entry.network.float().eval()
        inputs = tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, given)
        refused = _refused(network, inputs, recipe, say)
    if refused:
        head = (
            "the model cannot be exported as it is, so nothing was trained (take the backend out "
            "of export, change the model, or train all the same with --no-preflight):"
        )
        raise SlimkitError("\n  ".join([head, *refused]))


def _refused(
    network: nn.Module, inputs: tuple[Any, ...], recipe: Recipe, say: Callable[[str], None]
) -> list[str]:
    """What each backend says against the network in float, rewritten as the recipe says."""
    if recipe.rewrite:
        chosen = [rewrite.model_dump() for rewrite in recipe.rewrite]
        rewrite_(network, first_sample(inputs), chosen)
    section = recipe.quantize
    aware = section is not None and section.train_from is not None
    tried = aware or (section is not None and size_mb(network) < SMALL_MB)
    refused = []
    for result in _asked(network, inputs, recipe, quantized=tried):
        if result.kind == "float":
            refused += [f"{result.backend}: {problem}" for problem in result.problems]
        elif result.larger:
            refused.append(f"{result.backend}, int8: {result.larger}; take quantize out")
        elif aware:
            for problem in result.problems:
                say(f"{result.backend}, int8: {problem}")
    return refused


def _asked(
    network: nn.Module, inputs: tuple[Any, ...], recipe: Recipe, *, quantized: bool
) -> list[Preflight]:
    """What each backend of the recipe makes of the network, and of the int8 that it asks for."""
    section, options = recipe.quantize, dict[str, Any]()
    if section is not None:
        options = {
            "weights": section.weights.model_dump(),
            "keep_float": section.keep_float,
            "weight_bits": section.weight_bits,
        }
    return preflight(network, inputs, backends_of(recipe), quantized=quantized, **options)
