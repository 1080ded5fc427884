"""`slimkit run`: from a recipe to an artifact, and on from the last checkpoint after a crash."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from slimkit.batchnorm import reestimate_
from slimkit.deploy.folder import behind, check_target
from slimkit.errors import GateError, SlimkitError
from slimkit.importing import build
from slimkit.interfaces import Criterion
from slimkit.parts import built, part_of
from slimkit.pruning.prune import cut_to_target_
from slimkit.pruning.report import PruningReport
from slimkit.pruning.sparsity import zero_
from slimkit.recipe import Import, Prune, Recipe
from slimkit.registry import discover
from slimkit.report.curves import write_curves
from slimkit.training.classification import lightning_of
from slimkit.training.deployment import Loaders, Release, deploy, example_of
from slimkit.training.evaluation import muted
from slimkit.training.fitting import fit, refuse_arguments
from slimkit.training.module import SlimModule
from slimkit.training.preflight import refuse_untrained
from slimkit.training.processes import is_first, join, meet, nothing, part
from slimkit.training.pruning import (
    coupling_of,
    scores_of,
    selector_of,
    target_of,
    training_loss,
)
from slimkit.training.pruning_scan import curves_of, starting
from slimkit.training.ranks import of_the_first, several
from slimkit.training.rehearsal import rehearse
from slimkit.training.rewriting import rewrite_network
from slimkit.training.sparsity import weights_ratio
from slimkit.training.workplace import (
    BEGUN,
    DENSE,
    LAST,
    Say,
    alone,
    compare_models,
    leave,
    prepare,
)
from slimkit.weights import load_weights


@dataclass
class Timing:
    """Seconds that each part of a run took, by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block under `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def run(
    recipe: Recipe, output: Path, *, say: Say, fresh: bool = False, preflight: bool = True
) -> tuple[Release, Timing] | None:
    """Do what `recipe` says and leave the artifact in `output`.

    Checkpoints lie in ``<output>.work`` until the run is done. The same call after a crash goes
    on from the last one; `fresh` starts over.

    Args:
        recipe: names model and data.
        output: the artifact's folder.
        say: called with one line at each step.
        fresh: forget an earlier unfinished run.
        preflight: try the model on each backend before a training begins.

    Returns:
        None in a process that only helped the first one to train.

    Raises:
        SlimkitError: bad input.
        GateError: a gate was missed; the artifact is in ``<output>.rejected``.
    """
    model_import, data_import = _needed(recipe)
    check_target(output)
    output = behind(output)
    work = output.with_name(f"{output.name}.work")
    join(recipe.trainer)
    if not is_first():
        meet()
        return _run(recipe, model_import, data_import, output, work, nothing)
    with alone(work):
        prepare(recipe, output, work, fresh, say)
        meet()
        return _run(recipe, model_import, data_import, output, work, say, preflight)


def _run(
    recipe: Recipe,
    model_import: Import,
    data_import: Import,
    output: Path,
    work: Path,
    say: Say,
    preflight: bool = False,
) -> tuple[Release, Timing] | None:
    """What follows in each process once the folder `work` is ready."""
    timing = Timing()
    with muted():
        pl.seed_everything(recipe.trainer.seed, workers=True, verbose=False)
    if recipe.pretrain is not None or recipe.trainer.max_epochs:
        refuse_arguments(recipe, work)

    def anew() -> pl.LightningDataModule:
        data: pl.LightningDataModule = build(
            data_import.model_dump(), "data", pl.LightningDataModule
        )
        return data

    data = anew()
    _check_loaders(data, recipe)
    pl.seed_everything(recipe.trainer.seed, workers=True, verbose=False)
    model = built(model_import.model_dump(), recipe.network)
    if recipe.weights is not None:
        load_weights(model, recipe.weights)
    part_of(model, recipe.network)  # one that is not there is said before any training
    if is_first():
        compare_models(model, work)
    if recipe.pretrain is not None and not (work / DENSE).is_file():
        rehearse(model, recipe, anew)
    if preflight and not several() and _begins(recipe, work):
        with timing.part("trying the model on each backend"):
            refuse_untrained(model, recipe, anew, say)
    with timing.part("training the dense model"):
        model = _pretrained(recipe, model, data, work, say)
    module = SlimModule(model, recipe)
    module.announce = say
    if recipe.rewrite:
        with timing.part("rewriting"):
            rewrite_network(module, Loaders(anew(), module.inner), say)
    if recipe.prune is not None and recipe.prune.ratios == "sensitivity":
        with timing.part("scanning sensitivity"):
            say("measuring how sensitive each group is to pruning")
            module.curves = curves_of(
                module,
                anew(),
                scan_folder(output),
                say=say,
                trainer=starting(recipe),
            )
            if is_first():
                write_curves(scan_folder(output), module.curves)
    pl.seed_everything(recipe.trainer.seed, workers=True, verbose=False)
    with timing.part("pruning, distilling, quantization-aware training"):
        if recipe.trainer.max_epochs:
            _fit(module, data, work, say)
        elif recipe.prune is not None:
            _prune_at_once(module, Loaders(data, module.inner), say)
    part()
    if not is_first():
        return None
    # what follows draws the same in a run that went on from a checkpoint
    pl.seed_everything(recipe.trainer.seed, workers=True, verbose=False)
    say("exporting, running and measuring the files")
    with timing.part("exporting and measuring"), _kept(work, say):
        release = deploy(module, data, output)
    leave(work)
    return release, timing


@contextmanager
def _kept(work: Path, say: Say) -> Iterator[None]:
    """Say, where the export fails, that the training is not lost."""
    try:
        yield
    except GateError:
        raise
    except SlimkitError:
        if (work / LAST).is_file():
            say(
                f"what is trained is kept in {work}: the same command goes on from it, also where "
                "the recipe's export has changed meanwhile"
            )
        raise


def _needed(recipe: Recipe) -> tuple[Import, Import]:
    if recipe.model is None or recipe.data is None:
        gap = "model" if recipe.model is None else "data"
        raise SlimkitError(f"the recipe names no {gap}: add `{gap}: package.module:name`")
    return recipe.model, recipe.data


def _begins(recipe: Recipe, work: Path) -> bool:
    """Whether a training follows, and nothing of it is done yet."""
    trains = recipe.pretrain is not None or recipe.trainer.max_epochs
    return bool(trains) and not any((work / name).is_file() for name in (LAST, BEGUN, DENSE))


def scan_folder(output: Path) -> Path:
    """Where the sensitivity scan of a run lies: beside the artifact, for further runs."""
    return output.with_name(f"{output.name}-sensitivity")


def _check_loaders(data: pl.LightningDataModule, recipe: Recipe) -> None:
    """Say before any training that something to train or to measure on is missing."""
    own = type(data)
    if own.train_dataloader is pl.LightningDataModule.train_dataloader:
        raise SlimkitError(f"data: {own.__name__} has no train_dataloader")
    names = ("test_dataloader", "val_dataloader")
    if all(getattr(own, n) is getattr(pl.LightningDataModule, n) for n in names):
        raise SlimkitError(
            f"data: {own.__name__} has neither a test nor a validation loader: accuracy and "
            "agreement cannot be measured"
        )
    scanned = recipe.prune is not None and recipe.prune.ratios == "sensitivity"
    if scanned and own.val_dataloader is pl.LightningDataModule.val_dataloader:
        raise SlimkitError(
            f"data: {own.__name__} has no validation loader, which prune.ratios: sensitivity "
            "measures on"
        )


def _pretrained(
    recipe: Recipe, model: nn.Module, data: pl.LightningDataModule, work: Path, say: Say
) -> nn.Module:
    """The model after the recipe's pretraining, if it asks for one; kept for a resumed run."""
    if recipe.pretrain is None:
        return model
    kept = work / DENSE
    if kept.is_file():
        say("the dense model was trained already; going on")
        load_weights(model, kept, "--fresh trains it anew")
        return model
    epochs = recipe.pretrain.max_epochs
    say(f"training the dense model for {epochs} epochs")
    begun = work / BEGUN
    if begun.is_file():
        say(f"going on from {begun}")
    inner = lightning_of(model, recipe.pretrain.optimizer)
    trainer = fit(inner, data, recipe, begun, epochs, [EpochLine(say)])
    inner.cpu()
    if several():  # batch-norm statistics are each process's own
        device = trainer.strategy.root_device
        model.load_state_dict(of_the_first(model.state_dict(), device))
    if is_first():
        partial = kept.with_suffix(".partial")
        plain = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
        try:
            save_file(plain, partial)
        except SafetensorError as error:  # which is how a full disk is told
            partial.unlink(missing_ok=True)
            raise SlimkitError(f"{kept} cannot be written: {error}") from error
        partial.rename(kept)
        begun.unlink(missing_ok=True)
    meet()
    return model


def _fit(module: SlimModule, data: pl.LightningDataModule, work: Path, say: Say) -> None:
    recipe, last = module.recipe, work / LAST
    if last.is_file():
        say(f"going on from {last}")
    fit(module, data, recipe, last, recipe.trainer.max_epochs, [EpochLine(say)])


def _prune_at_once(module: SlimModule, loaders: Loaders, say: Say) -> None:
    """One-shot pruning without training, for ``max_epochs: 0``."""
    section = module.recipe.prune
    assert section is not None
    if section.regularizer is not None:
        say(f"no {section.regularizer.name}: a regularizer needs training, and max_epochs is 0")
    network = module.network
    device = next(network.parameters()).device
    inputs = tree_map_only(Tensor, lambda t: t.to(device), example_of(loaders, module.entry))
    module.state.example_inputs = inputs
    if section.granularity == "channel":
        report = _cut_at_once(module, section, inputs, loaders)
    else:
        ref = section.criterion
        criterion: Criterion = discover().create("criterion", ref.name, ref.options)
        with training_loss(module.inner, ref.name) as loss:
            report = zero_(
                network,
                inputs,
                criterion,
                section.granularity,
                ratio=weights_ratio(section),
                ranking=section.ranking,
                max_ratio=section.max_ratio,
                block_size=section.block_size or (1, 4),
                protect=section.protect,
                protect_first=section.protect_first,
                batches=loaders.calibration(),
                loss=loss,
                count=section.data_batches,
                inputs_in=module.entry,
            )
    module.state.cut = True
    used = reestimate_(network, loaders.calibration(), section.batchnorm_batches, module.entry)
    weights = sum(count for count, _ in report.weights.values())
    living = sum(count for _, count in report.weights.values())
    zeros = f", {1 - living / weights:.1%} of the weights are zero" if weights else ""
    say(
        f"pruned at once to {report.macs[1] / report.macs[0]:.1%} of the MACs{zeros}; "
        f"batch-norm re-estimated on {used} batches"
    )


def _cut_at_once(
    module: SlimModule, section: Prune, inputs: tuple[Any, ...], loaders: Loaders
) -> PruningReport:
    network = module.network
    coupling = coupling_of(network, inputs, section)
    backends = [plugin.name for plugin in module.recipe.export]
    selector = selector_of(network, coupling, inputs, section, backends, module.curves)
    scores = scores_of(module.entry, coupling, section, loaders.calibration())
    return cut_to_target_(network, selector, scores, target_of(section), inputs)


class EpochLine(Checkpoint):
    """Says after each epoch where the run stands.

    It writes no checkpoint: Lightning calls these last, when all others have logged.

    Args:
        say: called with the line.
    """

    def __init__(self, say: Say) -> None:
        self.say = say

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """One line: epoch, phase, MACs left, loss, metric."""
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        if isinstance(module, SlimModule):
            parts += [module.phase, f"{module.state.macs_left:.0%} of MACs left"]
        ratio = trainer.callback_metrics.get("slimkit/sqnr_db")
        if ratio is not None:
            parts.append(f"SQNR {float(ratio):.1f} dB")
        for name, value in trainer.callback_metrics.items():
            if name in ("train_loss",) or name.startswith("val_"):
                parts.append(f"{name} {float(value):.4f}")
        self.say("  ".join(parts))
