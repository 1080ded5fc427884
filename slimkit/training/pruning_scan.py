"""Measures how sensitive a recipe's network is to pruning; a killed scan goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset

from slimkit.batches import first_sample, samples_in
from slimkit.errors import PruningError, SlimkitError
from slimkit.journal import Journal
from slimkit.progress import quiet
from slimkit.pruning.coupling import Coupling
from slimkit.pruning.sensitivity import PRECISION, RATIOS, Curve, Sums, scan
from slimkit.recipe import Prune, Recipe
from slimkit.training.copies import own_copy
from slimkit.training.deployment import Loaders
from slimkit.training.digest import digest
from slimkit.training.entering import Entry
from slimkit.training.evaluation import muted
from slimkit.training.measure import measure_of
from slimkit.training.module import SlimModule
from slimkit.training.processes import nothing
from slimkit.training.pruning import coupling_of, scores_of
from slimkit.training.scan import trained
from slimkit.training.transferring import Transferred

Say = Callable[[str], None]

BATCH = 64  # samples: a point is looked at after each batch
JOURNAL = "pruning.jsonl"
_START = ("accelerator", "devices", "strategy", "num_nodes")  # what of a trainer starts processes


def scan_pruning(
    recipe: Recipe, folder: Path, *, samples: int | None, precision: float, say: Say
) -> list[Curve]:
    """The curves of the recipe's network, measured on all devices of its trainer.

    Args:
        recipe: names model, weights and data; its prune section says what may go.
        folder: where each result is kept when it is known.
        samples: validation samples to use at most; None: all.
        precision: see `slimkit.pruning.sensitivity.scan`.
        say: called with one line at each step.

    Raises:
        SlimkitError: bad input.
    """
    if recipe.prune is None:
        raise SlimkitError(
            "the recipe has no prune section: there is nothing to scan (--quantize scans what "
            "rounding costs)"
        )
    model, data = trained(recipe, say)
    Loaders(data).validation()  # a missing one is said before the long work
    module = SlimModule(model, recipe)
    start = starting(recipe)
    return curves_of(
        module, data, folder, samples=samples, precision=precision, say=say, trainer=start
    )


def starting(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe's trainer decides where and in how many processes it runs."""
    return {k: v for k, v in recipe.trainer.arguments.items() if k in _START}


def curves_of(
    module: SlimModule,
    data: Any,
    folder: Path,
    *,
    samples: int | None = None,
    precision: float = PRECISION,
    say: Say,
    trainer: Mapping[str, Any] | None = None,
) -> list[Curve]:
    """The curves of a module's network as it is; a scan in `folder` is gone on from.

    Args:
        module: not changed.
        data: a LightningDataModule, or a Trainer that has loaders.
        folder: for `JOURNAL`.
        samples: validation samples to use at most; None: all.
        precision: see `slimkit.pruning.sensitivity.scan`.
        say: called with one line at each step.
        trainer: where to run: accelerator, devices, strategy; left out: one device. Several
            processes share the groups out.

    Raises:
        SlimkitError: bad input.
    """
    section = module.recipe.prune
    assert section is not None
    loaders = Loaders(data, module.inner)
    batches = drawn(loaders.validation(), module.recipe.trainer.seed, samples, say)
    worker = _Scan(module, section, loaders, batches, folder, precision, say)
    try:
        with muted():
            runner = pl.Trainer(
                **{"accelerator": "cpu", "devices": 1, **(trainer or {})},
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=1,
                inference_mode=False,
            )
            once = DataLoader(TensorDataset(torch.zeros(1)))
            runner.validate(worker, dataloaders=once, verbose=False)
    except MisconfigurationException as error:
        raise SlimkitError(f"Lightning: {error}") from error
    return worker.curves


class _Scan(pl.LightningModule):
    """The scan as a validation, so that Lightning starts the processes and chooses the device."""

    def __init__(
        self,
        module: SlimModule,
        section: Prune,
        loaders: Loaders,
        batches: Any,
        folder: Path,
        precision: float,
        say: Say,
    ) -> None:
        super().__init__()
        self.inner = own_copy(module.inner)
        self.section, self.path = section, module.recipe.network
        self.loaders, self.batches = loaders, batches
        self.folder, self.precision, self.say = folder, precision, say
        self.curves: list[Curve] = []

    def validation_step(self, _batch: Any, _index: int) -> None:
        """Everything happens before."""

    def on_validation_start(self) -> None:
        """Scan this process's groups, and gather those of all."""
        say = self.say if self.global_rank == 0 else nothing
        inner, section = self.inner, self.section
        entry = Entry(inner, self.path)
        network = entry.network
        moved = _Moved(self.batches, inner, self.loaders.data, self.device)
        batch = next(iter(moved), None)
        if batch is None:
            raise SlimkitError("the validation data is empty: it gave no batch")
        inputs = first_sample(entry.tried(batch))
        coupling = coupling_of(network, inputs, section)
        if not coupling.groups:
            reasons = "; ".join(f"{n}: {r}" for n, r in list(coupling.frozen.items())[:8])
            raise PruningError(f"nothing can be pruned: {reasons or 'no group'}")
        measure = measure_of(entry, batch, say)
        rank, ranks = self.global_rank, self.trainer.world_size
        key = self._key(network, coupling, batch, measure.unit)
        whole = Journal(self.folder / JOURNAL, key, _result, say)
        share = f"pruning.{rank + 1}-of-{ranks}.jsonl"
        journal = whole if ranks == 1 else Journal(self.folder / share, key, _result, say)
        results = [*whole.results, *(journal.results if ranks > 1 else ())]
        if results:
            say(f"going on from {self.folder}: {len(results)} results are known")
        orders = _orders(whole.header or journal.header)
        if orders is None:
            scores = scores_of(entry, coupling, section, self.loaders.calibration())
            orders = {n: torch.argsort(s, descending=True, stable=True) for n, s in scores.items()}
        header = {"orders": {name: order.tolist() for name, order in orders.items()}}
        journal.start(header)

        def done(number: int, group: str, sums: Mapping[int, Sums]) -> None:
            results.append((number, group, dict(sums)))
            journal.add(_entry(number, group, sums))

        with quiet(rank != 0):
            curves = scan(
                network,
                Coupling(coupling.groups[rank::ranks], {}),
                orders,
                moved,
                measure,
                precision=self.precision,
                known={(number, group): sums for number, group, sums in results},
                done=done,
            )
        if ranks > 1:
            everyone: list[Any] = [None] * ranks
            dist.all_gather_object(everyone, (curves, results))
            curves = [curve for share_of_curves, _ in everyone for curve in share_of_curves]
            if rank == 0 and not whole.header:  # a run on one device may go on from it
                whole.start(header)
                for _, theirs in everyone:
                    for one in theirs:
                        whole.add(_entry(*one))
        place = {group.name: i for i, group in enumerate(coupling.groups)}
        self.curves = sorted(curves, key=lambda curve: place[curve.group])

    def _key(
        self,
        network: torch.nn.Module,
        coupling: Coupling,
        batch: Any,
        unit: str,
    ) -> str:
        """A hash of the weights, the groups, the data and the options."""
        section = self.section
        what = {
            "criterion": section.criterion.model_dump(),
            "data_batches": section.data_batches,
            "groups": [
                [group.name, group.channels, *sorted({m.tensor for m in group.members})]
                for group in coupling.groups
            ],
            "batches": len(self.batches),
            "ratios": RATIOS,
            "precision": self.precision,
            "unit": unit,
        }
        return digest(json.dumps(what), network.state_dict(), batch)


def _entry(number: int, group: str, sums: Mapping[int, Sums]) -> Any:
    """One result as a line of a journal."""
    return [number, group, {count: asdict(one) for count, one in sums.items()}]


def _result(entry: Any) -> tuple[int, str, dict[int, Sums]]:
    number, group, sums = entry
    return int(number), str(group), {int(count): Sums(**one) for count, one in sums.items()}


def _orders(header: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Which channels an earlier scan silenced: the same again, whatever the criterion says now."""
    orders = header.get("orders")
    return orders and {name: torch.tensor(order) for name, order in orders.items()}


class _Moved:
    """Batches on the module's device, through the hooks of the data module or the module."""

    def __init__(
        self, batches: Any, inner: pl.LightningModule, data: Any, device: torch.device
    ) -> None:
        self.batches = batches

        def move(batch: Any) -> Any:
            return inner.transfer_batch_to_device(batch, device, 0)

        self.moved = Transferred(batches, data, inner, move=move)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.moved)


def drawn(loader: Any, seed: int, samples: int | None, say: Say) -> Any:
    """The loader's samples in small batches in a random order that is always the same.

    The first batches must stand for all of the data, and many loaders give one class after the
    other. Where the data cannot be drawn from (a stream, a sampler of the user's own), its batches
    come as they are.

    Args:
        loader: a validation loader; of several, the first.
        seed: of the order.
        samples: how many to draw; None: all.
        say: told where they are not drawn.
    """
    if isinstance(loader, list | tuple | Mapping):
        several_loaders = list(loader.values()) if isinstance(loader, Mapping) else list(loader)
        if len(several_loaders) > 1:
            say("there are several validation loaders: the scan uses the first")
        loader = several_loaders[0]
    plain = isinstance(loader, DataLoader) and isinstance(
        loader.sampler, SequentialSampler | RandomSampler
    )
    if plain and loader.batch_size and hasattr(loader.dataset, "__len__"):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(loader.dataset), generator=generator).tolist()[:samples]
        return DataLoader(
            loader.dataset,
            min(BATCH, loader.batch_size),
            sampler=order,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
        )
    say("the validation data cannot be drawn from at random: its batches are used as they come")
    return _AsTheyCome(loader, samples)


class _AsTheyCome:
    """Batches of a loader until enough samples are there; counted where it has no length."""

    def __init__(self, loader: Any, samples: int | None) -> None:
        self.loader, self.samples = loader, samples
        self.count = sum(1 for _ in self)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for batch in self.loader:
            if self.samples is not None and seen >= self.samples:
                return
            yield batch
            seen += samples_in(batch)
