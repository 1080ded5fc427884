"""`SlimModule`: any LightningModule or classifier, compressed while it trains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from slimkit.batches import as_inputs
from slimkit.copies import compiled_parts, copied
from slimkit.errors import QuantizationError, SlimkitError
from slimkit.parts import complete_, part_of
from slimkit.pruning.removal import remove_
from slimkit.pruning.report import PruningReport
from slimkit.pruning.sensitivity import Curve
from slimkit.quantization.calibration import maker
from slimkit.quantization.fake import FakeQuantization
from slimkit.quantization.sites import Sites
from slimkit.recipe import Recipe
from slimkit.rewriting.changes import apply_
from slimkit.rewriting.report import RewritingReport
from slimkit.rewriting.rewrite import Evaluate, rewrite_
from slimkit.training.averages import averages_of, copies_of
from slimkit.training.catching import Catch
from slimkit.training.classification import Classification, network_of
from slimkit.training.copies import own_copy
from slimkit.training.distillation import Distillation
from slimkit.training.entering import Entry, overrides
from slimkit.training.learning import DistillationCallback
from slimkit.training.loss_weights import is_constant, weight_at
from slimkit.training.manual import adding
from slimkit.training.optimizers import places_of
from slimkit.training.pruning import ChannelPruning
from slimkit.training.quantization import QuantizationCallback, scheme_of
from slimkit.training.restoring import restore_
from slimkit.training.sparsity import WeightPruning
from slimkit.training.timeline import progress
from slimkit.training.twins import cut_twin_

if TYPE_CHECKING:
    from slimkit.training.deployment import Release

_THEIRS = (
    "_hparams",
    "_hparams_initial",
    "_hparams_name",
    "_log_hyperparams",
    "_example_input_array",
)
"""What loggers take from a module."""
_OWN = {
    "configure_model",
    "setup",
    "configure_optimizers",
    "on_save_checkpoint",
    "on_load_checkpoint",
}


@dataclass
class Progress:
    """What has been done to the network so far; saved in every checkpoint.

    Args:
        example_inputs: one sample of the network's inputs.
        updates: steps of the pruning schedule taken.
        living: group -> channels that still live, before the cut; or weight -> which of it live.
        carried: group -> the share of the dense group's importance that the living carry.
        cut: whether the dead channels have been removed, or the zero weights are final.
        macs_left: fraction of the dense model's multiply-accumulates.
        observed: training batches that the activation quantizers have seen.
        distilled: whether the network has learnt from the teacher.
        twins: what was cut with the network since it follows it: its path, and the path in the
            network of what it follows.
    """

    example_inputs: tuple[Any, ...] = ()
    updates: int = 0
    living: dict[str, Tensor] = field(default_factory=dict)
    carried: dict[str, float] = field(default_factory=dict)
    cut: bool = False
    macs_left: float = 1.0
    observed: int = 0
    distilled: bool = False
    twins: list[tuple[str, str]] = field(default_factory=list)


class SlimModule(pl.LightningModule):
    """Wraps a module so that fitting it prunes, distils and quantizes it as a recipe says.

    The wrapped LightningModule's steps, optimizers, metrics, hooks and loggers go on working: it
    is `inner` here, its hooks are called as before and what it logs is logged.

    Args:
        module: a LightningModule, or an nn.Module where the recipe says ``task: classification``.
            It is copied; the given one is not changed. As it is, it becomes the teacher.
        recipe: a `Recipe`, a path to one, or a mapping; ``model``, ``data`` and ``trainer`` in it
            are not used here, since you hold module, data and trainer yourself.

    Example:
        .. code-block:: python

            module = slimkit.SlimModule(my_lightning_module, "recipe.yaml")
            Trainer(max_epochs=30).fit(module, datamodule)
            module.export("runs/small", datamodule)
    """

    def __init__(self, module: nn.Module, recipe: Recipe | Mapping[str, Any] | str | Path) -> None:
        super().__init__()
        self.recipe = _recipe(recipe)
        self.state = Progress()
        self.fake: FakeQuantization | None = None
        self.curves: Sequence[Curve] | None = None  # for prune.ratios: sensitivity
        self.places: dict[str, int] = {}  # of parameter groups, in a run that goes on
        self.announce: Callable[[str], None] = _announce
        self._compiled = compiled_parts(module)
        own = complete_(own_copy(module), self.recipe.network)
        self.inner: pl.LightningModule
        if isinstance(own, pl.LightningModule):
            self.inner = own
        elif self.recipe.task == "classification":
            self.inner = Classification(own, self.recipe.optimizer)
        else:
            _refuse_other_lightning(module)
            raise SlimkitError(
                f"{type(module).__name__} is no LightningModule: give it a loss with "
                "'task: classification' in the recipe, or wrap it in a LightningModule of your own"
            )
        self.automatic_optimization = self.inner.automatic_optimization
        for name in _THEIRS:
            if hasattr(self.inner, name):  # so that loggers get the wrapped module's
                setattr(self, name, getattr(self.inner, name))
        # Held in a tuple so that neither is a submodule: a teacher belongs in no checkpoint, and
        # the dense copy is what the proof compares with.
        self.entry = Entry(self.inner, self.recipe.network)
        self._dense = (own_copy(self.network).eval(),)
        distill = self.recipe.distill
        self.distillation: tuple[Distillation, ...] = ()
        if distill is not None:
            distillation = Distillation(self.entry, distill, self.recipe.optimizer, self._tell)
            self.distillation = (distillation,)
        self._forward_hooks_of_inner()

    @property
    def network(self) -> nn.Module:
        """What is compressed: the plain model, or the LightningModule itself, or a part of it."""
        return self.entry.network

    @property
    def dense(self) -> nn.Module:
        """A copy of the network as it was given."""
        return self._dense[0]

    @property
    def strict_loading(self) -> bool:
        """The wrapped module's: whether checkpoints must hold all of its weights."""
        return self.inner.strict_loading

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        self.inner.strict_loading = strict_loading

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """All tensors by name; of the wrapped module those that it names itself."""
        if args or kwargs or type(self.inner).state_dict is nn.Module.state_dict:
            return super().state_dict(*args, **kwargs)
        own = {f"inner.{name}": tensor for name, tensor in self.inner.state_dict().items()}
        for name, part in self.named_children():
            if part is not self.inner:
                part.state_dict(destination=own, prefix=f"{name}.")
        return own

    @property
    def rewriting(self) -> RewritingReport | None:
        """What was rewritten of the network."""
        return getattr(self.network, "slimkit_rewriting", None)

    def _dense_as_rewritten(self) -> nn.Module:
        """The dense network in the structure that the network has before a cut."""
        before: RewritingReport | None = getattr(self.dense, "slimkit_rewriting", None)
        changes = self.rewriting.changes if self.rewriting else []
        since = changes[len(before.changes) if before else 0 :]
        if not since:
            return self.dense
        dense = own_copy(self.dense)
        apply_(dense, since)
        return dense

    @property
    def averaging_teachers(self) -> list[nn.Module]:
        """The networks of teachers that are averages of this one."""
        return [a.network for distillation in self.distillation for a in distillation.averages]

    @property
    def phase(self) -> str:
        """What the run is doing, for people."""
        if self.fake is not None:
            return "quantization-aware"
        if self.recipe.prune is not None and not self.state.cut:
            return "pruning" if self.state.updates else "before pruning"
        return "recovery" if self.recipe.prune is not None else "training"

    def rewrite_(
        self,
        example_inputs: Any,
        data: Iterable[Any] | None = None,
        evaluate: Evaluate | None = None,
    ) -> RewritingReport:
        """Rewrite the network as the recipe says, before it is trained; `dense` stays as it is.

        Args:
            example_inputs: a tensor, or a tuple of the network's arguments.
            data: batches to measure on what approximate rewrites cost; left out, the inputs.
            evaluate: the metric of a module, measured before and after approximate rewrites.

        Raises:
            RewritingError: a rewrite finds nothing to do, or an exact one changes the outputs.
        """
        before = self.rewriting.changes if self.rewriting else []
        chosen = [rewrite.model_dump() for rewrite in self.recipe.rewrite]
        inputs = as_inputs(example_inputs)
        report = rewrite_(self.network, inputs, chosen, data=data, evaluate=evaluate)
        for average in self.averaging_teachers:
            apply_(average, report.changes[len(before) :])
        return report

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's forward, with fake-quantizers once they are there."""
        return self._simulated(self.inner.forward)(*args, **kwargs)

    def _configure_inner(self) -> None:
        """Ask the wrapped module for what it builds late.

        Raises:
            SlimkitError: it makes another network than the one that was wrapped.
        """
        self._late("configure_model", self.inner.configure_model)

    def _late(self, name: str, hook: Callable[..., Any], *args: Any) -> None:
        """Call a hook of the wrapped module that may build something.

        Raises:
            SlimkitError: it makes another network than the one that was wrapped.
        """
        before = {id(p): p for p in self.network.parameters()}  # alive, so that ids stay theirs
        hook(*args)
        now = network_of(self.inner, self.recipe.network)
        present = {id(p): path for path, p in now.named_parameters()}
        added = [path for number, path in present.items() if number not in before]
        if added and name == "setup":
            self.announce(
                f"setup of {type(self.inner).__name__} adds {added[0]}"
                f"{' and more' if len(added) > 1 else ''}, which the dense network that it is "
                "compared with lacks: build it in __init__, or name the part that is compressed "
                "with network"
            )
        if now is not self.network or not before.keys() <= present.keys():
            raise SlimkitError(
                f"{name} of {type(self.inner).__name__} builds another network than the one that "
                "SlimModule was given: let it do nothing where there is one, or build the network "
                "in __init__"
            )

    def configure_callbacks(self) -> Any:
        """The callbacks of the recipe's timeline, after the wrapped module's own."""
        theirs = self.inner.configure_callbacks()
        callbacks = list(theirs) if isinstance(theirs, Sequence) else [theirs]
        recipe = self.recipe
        if recipe.prune is not None:
            channels = recipe.prune.granularity == "channel"
            callbacks.append((ChannelPruning if channels else WeightPruning)(self, recipe.prune))
        callbacks += [DistillationCallback(self, own) for own in self.distillation]
        if recipe.quantize is not None and recipe.quantize.train_from is not None:
            first = recipe.export[0]
            callbacks.append(QuantizationCallback(self, recipe.quantize, first))
        return callbacks

    def configure_optimizers(self) -> Any:
        """The wrapped module's."""
        return self.inner.configure_optimizers()

    def setup(self, stage: str) -> None:
        """Refuse what cannot work, before training; then the wrapped module's own set-up."""
        if stage == "fit" and self.recipe.rewrite and self.rewriting is None:
            raise SlimkitError(
                "the recipe rewrites the network: call module.rewrite_(example_inputs) before "
                "Trainer.fit"
            )
        if stage == "fit" and self.recipe.quantize is not None:
            for backend in self.recipe.export:  # weight_bits that do not fit are said now
                scheme_of(backend, self.recipe.quantize)
        self._late("setup", self.inner.setup, stage)
        gate = self.recipe.gates.accuracy_drop
        measured = overrides(self.inner, "validation_step")
        if stage == "fit" and gate is not None and not measured:
            raise SlimkitError(
                f"gates.accuracy_drop: {type(self.inner).__name__} has no validation_step to "
                "measure by: write one that logs a metric, or leave the gate out"
            )
        if stage == "fit" and self._compiled:
            self.announce(
                f"{', '.join(self._compiled)} trains without torch.compile, since slimkit changes "
                "structure and operations: compile what comes out"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add structure, schedule and sites, so that the same run can go on."""
        self.inner.on_save_checkpoint(checkpoint)
        report: PruningReport | None = getattr(self.network, "slimkit_pruning", None)
        checkpoint["slimkit"] = {
            "progress": dict(vars(self.state)),
            "report": None if report is None else dict(vars(report)),
            "fake": None
            if self.fake is None
            else {
                "sites": dict(vars(self.fake.sites)),
                "state": self.fake.state,
                "weight_bits": self.fake.scheme.weights.bits,
            },
            "distillation": [distillation.state() for distillation in self.distillation],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Cut the network and build the fake-quantizers, so that the saved tensors fit."""
        saved = checkpoint.get("slimkit")
        if saved is None:
            raise SlimkitError("this checkpoint was not written by a SlimModule")
        self.state = Progress(**saved["progress"])
        self.places = places_of(checkpoint.get("optimizer_states", ()))
        self.fake = None
        networks = (self.network, *averages_of(self, self._trainer))
        dense = self._dense_as_rewritten()
        for network in networks:  # the checkpoint may be from before a cut
            restore_(network, dense)
        if saved["report"] is not None:
            report = PruningReport(**saved["report"])
            for network in networks:
                remove_(network, report.kept, report.attributes)
            inside = {id(part) for part in self.network.modules()}
            for path, of in self.state.twins:
                twin = self.inner.get_submodule(path)
                if id(twin) not in inside:
                    restore_(twin, part_of(dense, of or None))
                    cut_twin_(twin, of, report.kept, report.attributes)
            self.network.slimkit_pruning = report  # type: ignore[assignment]
        states = saved.get("distillation", ())
        for distillation, state in zip(self.distillation, states, strict=False):
            distillation.load(state)
        quantize = self.recipe.quantize
        if saved["fake"] is not None and quantize is not None:
            bits = saved["fake"].get("weight_bits", quantize.weight_bits)  # not this processor's
            section = quantize.model_copy(update={"weight_bits": bits})
            self.fake = FakeQuantization(
                Sites(**saved["fake"]["sites"]),
                scheme_of(self.recipe.export[0], section),
                maker(quantize.weights.model_dump()),
                maker(quantize.activations.model_dump()),
                dict(self.network.named_parameters(remove_duplicate=False)),
            )
            self.fake.state = saved["fake"]["state"]
            for copy in copies_of(self, self._trainer) if self._trainer is not None else ():
                copy.fake = copied(self.fake)
        self.inner.on_load_checkpoint(checkpoint)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP, which asks for it by this name, leaves to `QuantizationCallback`.

        Fake-quantizers come in the middle of a training, and learned ranges are frozen later; DDP
        keeps to the parameters that it met first.
        """
        if self.fake is None:
            return []
        named = [*self.fake.named_parameters(), *self.fake.named_buffers()]
        return [f"fake.{name}" for name, _ in named]

    def say(self, message: str) -> None:
        """One line in the terminal about where the run stands."""
        epoch = f"epoch {self.trainer.current_epoch + 1}/{self.trainer.max_epochs}"
        self.announce(f"{epoch}: {message}")

    def _simulated(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step` with the fake-quantizers active in the network's operations.

        Ranges are taken from training batches only.
        """

        @functools.wraps(step)
        def simulated(*args: Any, **kwargs: Any) -> Any:
            if self.fake is None or (self.fake.state == "observe" and not self.training):
                return step(*args, **kwargs)
            with self.fake.active(self.network):
                return step(*args, **kwargs)

        return simulated

    def _without_recomputing(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """`backward` that refuses to compute operations of the network anew.

        They would compute without fake-quantizers, or count their calls otherwise.

        Raises:
            QuantizationError: it does.
        """
        quantize = self.recipe.quantize
        if quantize is None or quantize.train_from is None:
            return backward

        @functools.wraps(backward)
        def checked(*args: Any, **kwargs: Any) -> Any:
            names = {id(part): name for name, part in self.network.named_modules()}

            def refuse(part: nn.Module, _args: Any) -> None:
                if id(part) in names:
                    raise QuantizationError(
                        f"{names[id(part)] or type(part).__name__} is computed a second time in "
                        "the backward (gradient checkpointing), where fake-quantizers do not see "
                        "it: turn checkpointing off, or leave quantize.train_from out"
                    )

            handle = register_module_forward_pre_hook(refuse)
            try:
                return backward(*args, **kwargs)
            finally:
                handle.remove()

        return checked

    def _train(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The wrapped training step with the distillation losses added."""

        @functools.wraps(step)
        def train(*args: Any, **kwargs: Any) -> Any:
            simulated = self._simulated(step)
            if self.recipe.prune is not None:
                self.log("slimkit/macs_left", self.state.macs_left)
            learns = self.recipe.prune or self.distillation or self.fake
            if learns and self._trainer is not None and self._trainer.optimizers:
                self.log("slimkit/lr", self._trainer.optimizers[0].param_groups[0]["lr"])
            if not self.distillation:
                return simulated(*args, **kwargs)
            distillation = self.distillation[0]
            batch = args[0] if args else kwargs.get("batch")
            batch_idx = self.trainer.fit_loop.batch_idx if self._trainer is not None else 0
            with distillation.watching() as caught:
                if not self.automatic_optimization:
                    taught = functools.partial(self._taught, caught, batch, batch_idx)
                    with adding(self.inner, caught, taught):
                        return simulated(*args, **kwargs)
                output = simulated(*args, **kwargs)
            if output is None:
                return None
            loss = output["loss"] if isinstance(output, Mapping) else output
            total = self._taught(caught, batch, batch_idx, loss)
            return {**output, "loss": total} if isinstance(output, Mapping) else total

        return train

    def _taught(self, caught: Catch, batch: Any, batch_idx: int, loss: Tensor) -> Tensor:
        """The module's own loss and the distillation losses, by their weights."""
        distillation = self.distillation[0]
        now = self._now(distillation, batch_idx)
        total = weight_at(distillation.recipe.label_weight, now) * loss
        compare = self._simulated(distillation.losses_of)
        # asked outside of the fake-quantizers' mode, in which a step that breaks off leaves traces
        inputs = None if caught.called else self.entry(batch)
        terms = compare(caught, batch, batch_idx, now, self._trainer, inputs)
        for name, value in terms.items():
            self.log(f"distill/{name}", value.detach())
            total = total + value
        self.state.distilled = True
        return total

    def _now(self, distillation: Distillation, batch_idx: int) -> float:
        """The fraction of the training that has passed; 0 where no weight asks for it."""
        weights = {c.name: c.entry.weight for c in distillation.comparisons}
        weights["labels"] = distillation.recipe.label_weight
        scheduled = {name: weight for name, weight in weights.items() if not is_constant(weight)}
        if not scheduled:
            return 0.0
        now = progress(self.trainer, batch_idx)
        for name, weight in scheduled.items():
            self.log(f"distill/weight/{name}", weight_at(weight, now))
        return now

    def _tell(self, line: str) -> None:
        self.announce(line)

    def _forward_hooks_of_inner(self) -> None:
        """Let Lightning call every hook that the wrapped module overrides."""
        inner = self.inner
        names = {n for hooks in (ModelHooks, DataHooks, CheckpointHooks) for n in vars(hooks)}
        names |= {"configure_gradient_clipping", "optimizer_step", "lr_scheduler_step", "backward"}
        names |= {"optimizer_zero_grad", "transfer_batch_to_device"}
        for name in sorted(names - _OWN):
            theirs = getattr(type(inner), name, None)
            if name.startswith("_") or theirs is getattr(pl.LightningModule, name, None):
                continue
            setattr(self, name, getattr(inner, name))
        if overrides(inner, "configure_model"):
            self.configure_model = self._configure_inner  # type: ignore[method-assign]
        for name in ("validation_step", "test_step", "predict_step"):
            if overrides(inner, name):
                setattr(self, name, self._simulated(getattr(inner, name)))
        self.backward = self._without_recomputing(self.backward)  # type: ignore[method-assign]
        self.training_step = self._train(inner.training_step)  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        """Tell the wrapped module which hook runs, and set what is its own, as tuners do."""
        modules = self.__dict__.get("_modules", {})
        inner = modules.get("inner")
        mine = name in self.__dict__ or name in modules or hasattr(type(self), name)
        mine = mine or name.startswith("_")
        if inner is not None and not mine and name in vars(inner):
            setattr(inner, name, value)
            return
        super().__setattr__(name, value)
        if inner is not None and name == "_current_fx_name":
            inner._current_fx_name = value

    def __getattr__(self, name: str) -> Any:
        """Attributes of the wrapped module are found here too (callbacks look for them)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_modules", {}).get("inner")
            if inner is None or name.startswith("_"):
                raise
            return getattr(inner, name)

    def export(self, directory: str | Path, datamodule: Any = None) -> Release:
        """Deploy the network with every backend of the recipe and write the artifact.

        See `slimkit.training.deployment.deploy` for what is measured and returned.

        Args:
            directory: the artifact's folder.
            datamodule: data to calibrate, compare and evaluate on; left out, the trainer's.
        """
        from slimkit.training.deployment import deploy

        if datamodule is None and self._trainer is not None:
            datamodule = self.trainer.datamodule or self.trainer  # type: ignore[attr-defined]
        if datamodule is None:
            raise SlimkitError("export needs data to compare on: pass your datamodule")
        return deploy(self, datamodule, Path(directory))


def _refuse_other_lightning(module: nn.Module) -> None:
    """Name the package whose LightningModule this is, where it is the other one.

    Raises:
        SlimkitError: it is.
    """
    names = {kind.__module__.partition(".")[0] for kind in type(module).__mro__}
    if "lightning" in names:
        raise SlimkitError(
            f"{type(module).__name__} is a LightningModule of the package 'lightning', whose "
            "classes are not those of 'pytorch_lightning': write import pytorch_lightning as pl "
            "(or as L), for its Trainer and data module as well"
        )


def _announce(line: str) -> None:
    rank_zero_info(f"slimkit: {line}")


def _recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.parse(recipe)
    return Recipe.read(recipe)
