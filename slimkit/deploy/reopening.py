"""Opens the files of an artifact on disk again, each beside its simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.batches import finite, first_sample, inputs_of, samples_of, to_cpu
from slimkit.deploy.agreement import Agreement, compare
from slimkit.deploy.artifact import is_graph, load
from slimkit.deploy.deployed import Deployed
from slimkit.deploy.folder import read_manifest, understood
from slimkit.deploy.layers import LEAST_DB, SAMPLES, LayerReport, per_layer
from slimkit.errors import ArtifactError, SlimkitError
from slimkit.evaluating import evaluating
from slimkit.interfaces import Backend, tensors_of
from slimkit.quantization.exact import exact
from slimkit.quantization.fake import QuantizedModel
from slimkit.quantization.widths import width_remark
from slimkit.registry import discover

EXPORTS = "exports"


@dataclass
class Reopened:
    """The file for one runtime and what it should compute.

    Args:
        runtime: the backend's name.
        backend: the backend.
        directory: the file's folder.
        simulation: what `slimkit.load` gives: a `QuantizedModel`, a float module, or the graph
            that the artifact holds where nobody knows the model's function.
    """

    runtime: str
    backend: Backend
    directory: Path
    simulation: nn.Module

    @property
    def network(self) -> nn.Module:
        """The user's module, whose forward says what a batch's inputs are."""
        inner = self.simulation
        return inner.model if isinstance(inner, QuantizedModel) else inner

    @property
    def too_wide(self) -> str | None:
        """What is to be said where sums of the file's weights overflow on this device."""
        if not isinstance(self.simulation, QuantizedModel):
            return None
        return width_remark(self.backend, self.simulation.fake.scheme.weights.bits)

    def agreement(self, batches: Iterable[Any], most: int = 1000) -> Agreement:
        """Run the file and the simulation on the same inputs.

        Args:
            batches: tensors, or (inputs, labels).
            most: how many inputs at most.

        Raises:
            SlimkitError: no batch, or one that the model does not take.
        """
        deployed = Deployed(self.backend.load(self.directory), lambda flat: flat, 1)
        simulated: list[list[Tensor]] = []
        computed: list[list[Tensor]] = []
        model: nn.Module | None = None
        for inputs in _inputs(batches, self.network, most):
            if not finite(inputs):
                raise SlimkitError("the data holds NaN or infinity: nothing can be compared on it")
            try:
                if model is None:
                    model = exact(self.simulation, first_sample(inputs))
                with torch.no_grad(), evaluating(model):
                    simulated.append(tensors_of(model(*inputs)))
                computed.append(deployed.flat(*inputs))
            except (RuntimeError, TypeError, ValueError, KeyError, AssertionError) as error:
                raise SlimkitError(
                    f"the data does not fit the model of {self.directory.parent.parent}: {error}"
                ) from error
        if not simulated:
            raise SlimkitError("the data is empty: it gave no batch")
        return compare(_together(simulated), _together(computed))

    def layers(
        self, batches: Iterable[Any], *, samples: int = SAMPLES, least_db: float = LEAST_DB
    ) -> LayerReport:
        """Compare inside the model; see `slimkit.deploy.layers.per_layer`.

        Raises:
            ArtifactError: nobody knows the function that builds the model.
        """
        if is_graph(self.simulation):
            raise ArtifactError(
                f"{self.directory.parent.parent} does not say which function builds its model, so "
                "its layers have no names: name it with --model, or pass model="
            )
        inputs = next(iter(_inputs(batches, self.network, samples)), None)
        if inputs is None:
            raise SlimkitError("the data is empty: it gave no batch")
        return per_layer(
            self.simulation,
            self.backend,
            inputs,
            real=self.directory,
            samples=samples,
            least_db=least_db,
        )


def reopen(
    directory: str | Path,
    model: Callable[[], nn.Module] | nn.Module | None = None,
    *,
    backend: str | None = None,
) -> list[Reopened]:
    """The files of an artifact, one a runtime, each with the simulation that it was made from.

    Args:
        directory: an artifact of `slimkit run`, `slimkit.export` or `SlimModule.export`.
        model: the function that builds the dense model, where the artifact does not name it.
        backend: only the file for this runtime.

    Raises:
        ArtifactError: the folder is damaged, holds no file, or none for that runtime.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    exports = folder / EXPORTS
    names = sorted(p.name for p in exports.iterdir() if p.is_dir()) if exports.is_dir() else []
    if not names:
        raise ArtifactError(
            f"{folder} holds no file for any runtime (it was written by slimkit.save): export it"
        )
    if backend is not None and backend not in names:
        raise ArtifactError(f"{folder} holds files for {', '.join(names)}, not for {backend}")
    with understood(folder):
        options, simulated = _options(manifest), [*manifest["quantization"]]
    found = []
    for name in [backend] if backend is not None else names:
        made: Backend = discover().create("backend", name, options.get(name, {}))
        quantized = name if name in simulated else None
        simulation = load(folder, model, backend=quantized)
        found.append(Reopened(name, made, exports / name, simulation))
    return found


def _options(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options that each backend was given, by the recipe or by whoever made it."""
    recipe = manifest.get("recipe") or {}
    given = {ref["name"]: ref.get("options") or {} for ref in recipe.get("export", [])}
    return {**manifest.get("options", {}), **given}


def _inputs(batches: Iterable[Any], network: nn.Module, most: int) -> Iterable[tuple[Any, ...]]:
    """The inputs of each batch, `most` samples in all."""
    left = most
    for batch in batches:
        inputs = to_cpu(inputs_of(batch, network))
        sizes = [t.shape[0] for t in inputs if isinstance(t, Tensor) and t.dim()]
        size = sizes[0] if sizes else 1
        yield samples_of(inputs, 0, left) if size > left else inputs
        left -= size
        if left <= 0:
            return


def _together(batches: list[list[Tensor]]) -> list[Tensor]:
    """Each output over all batches."""
    return [
        torch.cat([t if t.dim() else t[None] for t in column])
        for column in zip(*batches, strict=True)
    ]
