"""`export`: one model, one runtime, one artifact that can be run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from slimkit.acceptance import check_module, check_samples, check_single
from slimkit.batches import as_inputs, finite, first_sample, inputs_of, joined, to_cpu
from slimkit.copies import copied
from slimkit.deploy.artifact import Contents, write
from slimkit.deploy.deployed import MISREAD, Deployed, compile_, open_
from slimkit.deploy.folder import check_target, replacing
from slimkit.deploy.layers import LEAST_DB, SAMPLES, LayerReport, per_layer
from slimkit.deploy.provenance import options_of
from slimkit.deploy.release import Row, release
from slimkit.errors import ExportError, SlimkitError
from slimkit.interfaces import Backend
from slimkit.quantization.fake import QuantizedModel
from slimkit.quantization.finished import finish
from slimkit.quantization.widths import width_remark
from slimkit.registry import discover
from slimkit.weights import sick

DOUBT_DB = 30.0
"""Signal to difference of an int8 file below which its float twin is made and compared as well."""
LEAST_SHARE = 0.9
"""Agreement of an int8 file below which `export` warns, as it does below `LEAST_DB`."""


class Artifact:
    """An exported model: its folder, its measurements, and the file itself, ready to run.

    Args:
        directory: the artifact's folder.
        row: what was measured.
        deployed: the opened file.
        model: what the file was made from.
        backend: the runtime.
    """

    def __init__(
        self, directory: Path, row: Row, deployed: Deployed, model: nn.Module, backend: Backend
    ) -> None:
        self.directory = directory
        self.row = row
        self._deployed = deployed
        self._model = model
        self._backend = backend

    def run(self, *inputs: Any) -> Any:
        """The outputs of the deployed file for `inputs`, in the model's own structure."""
        with torch.no_grad():
            return self._deployed(*inputs)

    @property
    def latency_ms(self) -> float:
        """Median time of one sample on one thread."""
        return self.row.latency.median_ms

    @property
    def size_bytes(self) -> int:
        """Bytes of the runtime's files."""
        return self.row.size_bytes

    @property
    def agreement(self) -> float:
        """How far the file computes what the simulation does, 0 to 1.

        The fraction of inputs with the same largest class; for outputs that are not of shape
        (batch, classes), the fraction of values within 1 % of the output's largest value.
        """
        return self.row.agreement.share

    @property
    def peak_bytes(self) -> int | None:
        """Memory that running the file takes; None where it could not be measured."""
        return self.row.peak_bytes

    def per_layer(
        self, inputs: Any, *, samples: int = SAMPLES, least_db: float = LEAST_DB
    ) -> LayerReport:
        """Compare what the runtime computes in each layer with the simulation.

        The model is compiled once more for that; the artifact stays as it is.

        Args:
            inputs: a tensor or a tuple of the forward's arguments, a batch of real data.
            samples: how many of them are compared at most.
            least_db: ratio of signal to difference below which a layer has departed, in decibels.

        Returns:
            The layers in order of execution; `LayerReport.first` is the one to look at.
        """
        return per_layer(
            self._model,
            self._backend,
            to_cpu(as_inputs(inputs)),
            real=self.directory / "exports" / self.row.runtime,
            samples=samples,
            least_db=least_db,
        )

    def __repr__(self) -> str:
        return (
            f"<Artifact {self.directory} for {self.row.runtime}: {self.size_bytes:,} bytes, "
            f"{self.latency_ms:.3f} ms, agreement {self.agreement:.2%}>"
        )


def export(
    model: nn.Module,
    example_inputs: Any,
    backend: str | Backend = "onnxruntime",
    *,
    directory: str | Path,
    data: Iterable[Any] | None = None,
    batches: int = 4,
) -> Artifact:
    """Compile `model` for a runtime, run the file, compare it with `model` and measure it.

    Args:
        model: a float model (pruned or not), or what `slimkit.quantize` returned.
        example_inputs: a tensor or a tuple of the forward's arguments; the file takes one sample.
        backend: a plugin's name, or an instance.
        directory: the artifact's folder; an artifact that lies there is replaced once the new one
            is complete.
        data: batches, with or without labels, to compare file and model on as well.
        batches: how many of them.

    Raises:
        ExportError: the backend cannot compile the model, or misreads it, or `model` was quantized
            for another.
        ArtifactError: `directory` holds something that slimkit did not write.

    Example:
        >>> import tempfile, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     artifact = export(net, torch.randn(4, 8), "torch", directory=folder + "/net")
        ...     tuple(artifact.run(torch.randn(2, 8)).shape)
        (2, 16)
    """
    check_module(model, "export")
    inputs = to_cpu(as_inputs(example_inputs))
    target = discover().create("backend", backend) if isinstance(backend, str) else backend
    name = backend if isinstance(backend, str) else discover().name_of("backend", target)
    folder = Path(directory)
    check_target(folder)
    if isinstance(model, QuantizedModel) and not target.scheme.holds(model.fake.scheme):
        raise ExportError(
            f"the model was quantized for {model.backend}, whose arithmetic is not {name}'s; "
            f"call slimkit.quantize(model, data, backend={name!r})"
        )
    if isinstance(model, QuantizedModel):
        wide = width_remark(target, model.fake.scheme.weights.bits)
        if wide is not None:
            warnings.warn(f"{name}: {wide}", stacklevel=2)
    own = copied(model).cpu().eval()
    network = own.model if isinstance(own, QuantizedModel) else own
    compared = [inputs]
    if data is not None:
        compared += [to_cpu(inputs_of(batch, network)) for batch in islice(data, batches)]
    try:
        together = joined(compared)
    except (RuntimeError, TypeError, ValueError) as error:
        raise SlimkitError(f"data does not fit example_inputs: {error}") from error
    if not finite(together):
        raise SlimkitError(
            "example_inputs or data hold NaN or infinity, on which nothing can be compared"
        )
    check_single(network)
    if broken := sick(network):
        raise ExportError(f"{broken} of the model holds NaN or infinity: it is no model")
    check_samples(network, together)
    with replacing(folder) as work:
        stage = "int8" if isinstance(own, QuantizedModel) else "compressed"
        rows = release(
            {stage: {name: own}},
            {name: target},
            inputs,
            work / "exports",
            agreement_inputs=together,
        )
        if isinstance(own, QuantizedModel):
            _doubted(rows[0], own.model, target, inputs)
        deployable = finish(own, first_sample(inputs))
        used = [("backend", discover().name_of("backend", target))]
        write(
            work,
            Contents(
                network,
                {name: own} if isinstance(own, QuantizedModel) else {},
                program=deployable.program,
                used=used,
                options={} if isinstance(backend, str) else {name: options_of(name, target)},
                metrics={"rows": [row.as_dict() for row in rows]},
            ),
        )
        deployed = open_(target, work / "exports" / name, deployable)
    return Artifact(folder, rows[0], deployed, own, target)


def _doubted(row: Row, network: nn.Module, backend: Backend, inputs: tuple[Any, ...]) -> None:
    """Find out why an int8 file departs far from its simulation: a float file would not round.

    Raises:
        ExportError: the float file is another model's, too: the backend misreads an operation.
    """
    worst = min(row.agreement.sqnr_db, default=DOUBT_DB)
    if not worst < DOUBT_DB:
        return
    try:
        with TemporaryDirectory(prefix="slimkit-") as name:
            compile_(network, backend, inputs, Path(name) / "float")
    except ExportError as error:
        if MISREAD in str(error):
            raise
    except Exception:  # a backend for integers alone, say: what the int8 file is worth is known
        pass
    if row.agreement.share < LEAST_SHARE or worst < LEAST_DB:
        warnings.warn(
            f"the int8 file for {row.runtime} agrees with its simulation in "
            f"{row.agreement.share:.1%} only ({worst:.1f} dB of signal to difference): the "
            "artifact's per_layer(inputs) finds where it departs",
            stacklevel=3,
        )
