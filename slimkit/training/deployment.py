"""From a trained `SlimModule` to an artifact: quantize, compile, evaluate the files, hold gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import nn

from slimkit.acceptance import check_samples
from slimkit.batches import first_sample, joined, to_cpu
from slimkit.copies import copied
from slimkit.deploy.artifact import Contents, write
from slimkit.deploy.deployed import compile_
from slimkit.deploy.folder import behind, check_target, move, replacing
from slimkit.deploy.gates import Judged, judged, missed
from slimkit.deploy.provenance import record, used_by
from slimkit.deploy.release import Row, release
from slimkit.deploy.verdict import verdicts
from slimkit.errors import ExportError, GateError, SlimkitError
from slimkit.interfaces import Backend
from slimkit.plain import plain
from slimkit.quantization.calibration import quantize
from slimkit.quantization.fake import QuantizedModel
from slimkit.quantization.widths import width_remark
from slimkit.recipe import Metric, Recipe
from slimkit.registry import discover
from slimkit.report.page import write_report
from slimkit.rewriting.changes import apply_
from slimkit.rewriting.report import RewritingReport, summarized
from slimkit.training.copies import own_copy
from slimkit.training.entering import Entry
from slimkit.training.evaluation import Evaluator
from slimkit.training.finite import check_finite
from slimkit.training.transferring import Transferred, hooks_of

if TYPE_CHECKING:
    from slimkit.training.module import SlimModule

MOST_COMPARED = 1000  # inputs on which file and simulation are compared


@dataclass(frozen=True)
class Release:
    """What `deploy` made and measured.

    Args:
        directory: the artifact.
        rows: one per stage and runtime.
        metric: which metric the rows hold; None where there was no data to evaluate on.
        data: what they were measured on: ``test`` or ``validation``.
        verdicts: per runtime, whether int8 pays.
        rewriting: what was rewritten before, and what it cost.
    """

    directory: Path
    rows: list[Row]
    metric: Metric | None
    data: str
    verdicts: dict[str, str]
    rewriting: RewritingReport | None = None


def deploy(module: SlimModule, data: Any, directory: Path) -> Release:
    """Deploy the network of `module` with every backend of its recipe and write the artifact.

    Dense, compressed and int8 models are compiled, run, compared and measured side by side; the
    last stage's files stay in the artifact.

    Args:
        module: trained, or pruned at once.
        data: a LightningDataModule, or a Trainer that has loaders.
        directory: the artifact's folder; what lies there is replaced only if all gates hold.

    Raises:
        GateError: a gate was missed; the artifact is written beside, with ``.rejected``.
    """
    recipe = module.recipe
    for folder in (directory, rejected(directory)):
        check_target(folder)
    _check_done(module)
    loaders = Loaders(data, module.inner)
    network = own_copy(module.network).cpu().float().eval()
    dense = own_copy(module.dense).cpu().float().eval()
    inputs = example_of(loaders, module.entry, network)
    backends = backends_of(recipe)
    stages: dict[str, dict[str, nn.Module]] = {
        "dense": _dense_for(backends, dense, module, inputs),
        "compressed": dict.fromkeys(backends, network),
    }
    quantized = _quantized(module, network, backends, loaders)
    if quantized:
        stages["int8"] = dict(quantized)
    evaluator = Evaluator(
        module.inner,
        loaders.evaluation(),
        recipe.metric,
        recipe.network,
        gated=recipe.gates.accuracy_drop is not None,
        data=data,
    )
    if not evaluator.can:
        module.announce(f"no metric: {evaluator.why_not}; files are compared with the simulation")
    compared = _inputs(loaders.compared(), module.entry, network)
    check_samples(network, compared)
    directory = behind(directory)
    with replacing(aside(directory)) as work:
        rows = release(
            stages,
            backends,
            inputs,
            work / "exports",
            agreement_inputs=compared,
            evaluate=evaluator if evaluator.can else None,
            labels=_labels(module),
        )
        result = Release(
            directory,
            rows,
            evaluator.metric,
            loaders.evaluated_on,
            verdicts(rows),
            module.rewriting,
        )
        gates = judged(
            recipe.gates,
            rows,
            larger_is_better=evaluator.metric is None or evaluator.metric.mode == "max",
        )
        _write(work, module, network, quantized, result, gates)
    if misses := missed(gates):
        move(aside(directory), rejected(directory))
        raise MissedGates(misses, replace(result, directory=rejected(directory)))
    move(aside(directory), directory)
    return result


class MissedGates(GateError):
    """The files work but miss a gate.

    Args:
        misses: one sentence a gate.
        release: what was measured; its directory is the rejected artifact.
    """

    def __init__(self, misses: list[str], release: Release) -> None:
        lines = ["a gate was missed:", *misses, f"the rejected artifact is in {release.directory}"]
        super().__init__("\n  ".join(lines))
        self.misses = misses
        self.release = release


class Loaders:
    """The loaders of a LightningDataModule or of a Trainer, for calibration and evaluation.

    Args:
        data: the data module or the Trainer.
        inner: the LightningModule that takes the batches; its hooks for batches are called, or the
            data module's, as Lightning does.
    """

    def __init__(self, data: Any, inner: pl.LightningModule | None = None) -> None:
        self.data = data
        self.inner = inner
        self._ready: set[str] = set()
        self.evaluated_on = "test"

    def calibration(self) -> Any:
        """Training batches."""
        loader = self._loader("fit", "train_dataloader", "train_dataloader")
        if loader is None:
            raise SlimkitError("the data has no training loader to take batches from")
        return Transferred(loader, self.data, self.inner)

    def evaluation(self) -> Any:
        """Test batches, or validation batches where there is no test set."""
        loader = self._evaluated()
        own = hooks_of(self.data)  # Lightning calls the module's own, but not these here
        return Transferred(loader, self.data, None, in_turn=True) if own else loader

    def _evaluated(self) -> Any:
        loader = self._loader("test", "test_dataloader", "test_dataloaders")
        if not loader:
            loader = self._loader("validate", "val_dataloader", "val_dataloaders")
            self.evaluated_on = "validation"
        if not loader:
            raise SlimkitError(
                "the data has neither a test nor a validation loader: accuracy and agreement "
                "cannot be measured"
            )
        return loader

    def compared(self) -> Any:
        """The batches of `evaluation`, one loader after the other, through the module's hooks."""
        return Transferred(self._evaluated(), self.data, self.inner, in_turn=True)

    def validation(self) -> Any:
        """Validation batches."""
        loader = self._loader("validate", "val_dataloader", "val_dataloaders")
        if not loader:
            raise SlimkitError(
                "the data has no validation loader: a sensitivity scan measures the loss on its "
                "batches"
            )
        return loader

    def selection(self) -> Any:
        """Validation batches, to choose by, where there are test batches beside them; or None."""
        if not self._loader("test", "test_dataloader", "test_dataloaders"):
            return None
        return self._loader("validate", "val_dataloader", "val_dataloaders")

    def _loader(self, stage: str, method: str, attribute: str) -> Any:
        if hasattr(self.data, "setup"):
            if stage not in self._ready:
                if not self._ready:
                    self.data.prepare_data()
                self.data.setup(stage)
                self._ready.add(stage)
            try:
                return getattr(self.data, method)()
            except Exception as error:
                if type(error).__name__ != "MisconfigurationException":  # not overridden
                    raise
                return None
        return getattr(self.data, attribute, None)


def example_of(loaders: Loaders, entry: Entry, network: nn.Module | None = None) -> tuple[Any, ...]:
    """One sample of the network's inputs, on the CPU, from the first training batch.

    Args:
        loaders: of the data.
        entry: takes the inputs out of a batch.
        network: or a copy of it, whose precision they get.

    Raises:
        SlimkitError: there is no batch.
    """
    batch = next(iter(loaders.calibration()), None)
    if batch is None:
        raise SlimkitError("the training data is empty: it gave no batch")
    return first_sample(to_cpu(entry(batch, network)))


def backends_of(recipe: Recipe) -> dict[str, Backend]:
    """The backends of a recipe's `export`, by name, with its options."""
    known = discover()
    return {ref.name: known.create("backend", ref.name, ref.options) for ref in recipe.export}


def _dense_for(
    backends: dict[str, Backend], dense: nn.Module, module: SlimModule, inputs: tuple[Any, ...]
) -> dict[str, nn.Module]:
    """The dense model for each backend: rewritten where it cannot be run as it was."""
    found = dict.fromkeys(backends, dense)
    if module.rewriting is None:
        return found
    for name, backend in backends.items():
        try:
            with TemporaryDirectory(prefix="slimkit-") as folder:
                compile_(dense, backend, inputs, Path(folder) / name)
        except ExportError:
            found[name] = own_copy(dense)
            apply_(found[name], module.rewriting.changes)
            module.announce(
                f"{name} cannot run the model as it was before it was rewritten: the dense one "
                "there is rewritten, too"
            )
    return found


def _check_done(module: SlimModule) -> None:
    """What the recipe asks for has happened, or it is an error; what was skipped is said."""
    recipe, state = module.recipe, module.state
    check_finite(module.network, "at the export")
    if recipe.prune is not None and not state.cut:
        raise SlimkitError(
            "the network has not been pruned yet: call Trainer.fit(module) to the end of "
            f"prune.during ({recipe.prune.during[1]}) before the export"
        )
    wants = recipe.quantize is not None and recipe.quantize.train_from is not None
    if wants and (module.fake is None or module.fake.state != "quantize"):
        module.announce(
            "quantization-aware training never began (the training was too short): ranges are "
            "found after training instead"
        )


def _labels(module: SlimModule) -> dict[str, str]:
    """What to call the stages: by what was really done."""
    done = ["rewritten"] if module.rewriting else []
    done += ["pruned"] if module.state.cut else []
    done += ["distilled"] if module.state.distilled else []
    return {"compressed": " + ".join(done) or "float", "int8": "int8, deployed"}


def _quantized(
    module: SlimModule, network: nn.Module, backends: dict[str, Backend], loaders: Loaders
) -> dict[str, QuantizedModel]:
    """The simulation for each backend; the first keeps the ranges it was trained with.

    The others take over what was learned for the weights and find ranges of activations anew.
    """
    section = module.recipe.quantize
    if section is None:
        return {}
    weights, activations = section.weights.model_dump(), section.activations.model_dump()
    evaluate, drop = None, module.recipe.gates.accuracy_drop
    drop = 0.01 if drop is None else drop
    if "auto" in section.keep_float and (loader := loaders.selection()):
        one = Evaluator(
            module.inner, loader, module.recipe.metric, module.recipe.network, data=loaders.data
        )
        evaluate = _larger_is_better(one) if one.can else None
    result = {}
    trained = module.fake if module.fake is not None and module.fake.state == "quantize" else None
    for name, backend in backends.items():
        if wide := width_remark(backend, section.weight_bits):
            module.announce(f"{name}: {wide}")
        scheme = backend.scheme_with(section.weight_bits)
        if trained is not None and trained.scheme == scheme:
            fake = copied(trained).cpu()
            result[name] = QuantizedModel(network, fake, name, (weights, activations)).eval()
            continue
        if trained is not None and name == module.recipe.export[0].name:
            module.announce(
                f"{name}: trained with weights of {trained.scheme.weights.bits} bits; ranges are "
                f"found anew for those of {scheme.weights.bits} that sum rightly here"
            )
        made = quantize(
            network,
            list(islice(module.entry.each(loaders.calibration()), section.calibration_batches)),
            backend,
            weights=weights,
            activations=activations,
            batches=section.calibration_batches,
            keep_float=section.keep_float,
            evaluate=evaluate,
            drop=drop,
            corrections=section.corrections,
            weight_bits=section.weight_bits,
        )
        if trained is not None:
            made.fake.take_learned_weights_(trained)
        for one in made.corrections:
            did = "kept" if one.kept else "left out"
            module.announce(
                f"{name}: {one.name} {did}, {one.before_db:.1f} to {one.after_db:.1f} dB at the "
                f"last layers, {one.seconds:.0f} s"
            )
        made.backend = name
        result[name] = made.eval()
    return result


def _larger_is_better(evaluator: Evaluator) -> Callable[[nn.Module], float]:
    """The metric, negated where less of it is better."""

    def evaluate(model: nn.Module) -> float:
        value = evaluator(model)
        return value if evaluator.metric is None or evaluator.metric.mode == "max" else -value

    return evaluate


def _inputs(loader: Any, entry: Entry, network: nn.Module) -> tuple[Any, ...]:
    """Inputs of up to `MOST_COMPARED` samples, as one large batch."""
    columns: list[tuple[Any, ...]] = []
    count = 0
    for batch in loader:
        inputs = to_cpu(entry(batch, network))
        columns.append(inputs)
        count += len(inputs[0]) if isinstance(inputs[0], torch.Tensor) else 1
        if count >= MOST_COMPARED:
            break
    if not columns:
        raise SlimkitError("the evaluation data is empty: it gave no batch")
    found: tuple[Any, ...] = joined(columns)
    return found


def _write(
    work: Path,
    module: SlimModule,
    network: nn.Module,
    quantized: dict[str, QuantizedModel],
    result: Release,
    gates: list[Judged],
) -> None:
    recipe = module.recipe
    (work / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    used = [("backend", ref.name) for ref in recipe.export]
    if recipe.prune is not None:
        used.append(("criterion", recipe.prune.criterion.name))
    if recipe.quantize is not None:
        used += [("quantizer", recipe.quantize.weights.name)]
        used += [("quantizer", recipe.quantize.activations.name)]
    if recipe.distill is not None:
        used += [("loss", loss.name) for loss in recipe.distill.losses]
    report = getattr(network, "slimkit_pruning", None)
    metrics = {
        "metric": None if result.metric is None else result.metric.model_dump(),
        "data": result.data,
        "rows": [row.as_dict() for row in result.rows],
        "verdicts": result.verdicts,
        "gates": [plain(gate) for gate in gates],
        "missed": missed(gates),
        "rewriting": summarized(result.rewriting),
        "corrections": {name: plain(made.corrections) for name, made in quantized.items()},
        "pruning": None if report is None else {"groups": report.groups, "frozen": report.frozen},
    }
    used += used_by(network, quantized)
    write_report(work / "report.html", metrics, recipe.to_yaml(), record(used))
    contents = Contents(
        network,
        quantized,
        model=None if recipe.model is None else recipe.model.model_dump(),
        recipe=recipe.model_dump(mode="json"),
        used=used,
        metrics=metrics,
    )
    write(work, contents)


def rejected(directory: Path) -> Path:
    """Where an artifact goes that misses a gate."""
    return directory.with_name(f"{directory.name}.rejected")


def aside(directory: Path) -> Path:
    """What a new artifact is called, with more behind it, while it is made."""
    return directory.with_name(f".{directory.name}.new")
