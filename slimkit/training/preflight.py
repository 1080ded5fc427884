"""Asks a recipe's backends about its model before any training."""

from __future__ import annotations

from collections.abc import Callable

from pytorch_lightning.utilities.seed import isolate_rng

from slimkit.batches import samples_of, to_cpu
from slimkit.deploy.preflight import Preflight, preflight
from slimkit.errors import SlimkitError
from slimkit.recipe import Recipe
from slimkit.registry import discover
from slimkit.training.classification import lightning_of
from slimkit.training.deployment import Loaders
from slimkit.training.entering import Entry
from slimkit.training.scan import trained

SAMPLES = 8
"""Of the first training batch, on which int8 finds its ranges here."""


def preflight_of(
    recipe: Recipe, say: Callable[[str], None], *, quantized: bool = True
) -> list[Preflight]:
    """What each backend of `export` makes of the recipe's model, float and int8.

    The model is built and rewritten as the recipe says, its first training batch gives the shapes;
    nothing is trained, pruned or kept.

    Args:
        recipe: names model, data and backends.
        say: called with a line where the model is not the one that will be exported.
        quantized: whether int8 is tried where the recipe quantizes.

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
    backends = {
        ref.name: discover().create("backend", ref.name, ref.options) for ref in recipe.export
    }
    section = recipe.quantize
    if section is None or not quantized:
        return preflight(entry.network.eval(), inputs, backends, quantized=False)
    return preflight(
        entry.network.eval(),
        inputs,
        backends,
        weights=section.weights.model_dump(),
        keep_float=section.keep_float,
        weight_bits=section.weight_bits,
    )


def refuse_untrained(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Stop before a training whose float file a backend of `export` could not make or run.

    int8 is tried where the training will be quantization-aware, and what stands in its way is said
    only: pruning may change it. What is rounded after a training can still be chosen then. Random
    numbers go on where they were.

    Args:
        recipe: names model, data and backends.
        say: called with one line for each problem of int8.

    Raises:
        SlimkitError: a file that the export makes in any case is impossible.
    """
    say(f"trying the model on {', '.join(ref.name for ref in recipe.export)}, before any training")
    aware = recipe.quantize is not None and recipe.quantize.train_from is not None
    with isolate_rng():
        found = preflight_of(recipe, lambda _line: None, quantized=aware)
    for result in found:
        if result.kind != "float":
            for problem in result.problems:
                say(f"{result.backend}, {result.kind}: {problem}")
    refused = [
        f"{result.backend}: {problem}"
        for result in found
        if result.kind == "float"
        for problem in result.problems
    ]
    if refused:
        head = (
            "the model cannot be exported as it is, so nothing was trained (take the backend out "
            "of export, change the model, or train all the same with --no-preflight):"
        )
        raise SlimkitError("\n  ".join([head, *refused]))
