"""The artifact: a folder with the compressed weights, the files for each runtime, and the proof."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimkit.batches import joined, samples_in, samples_of
from slimkit.copies import copied, uncompiled_
from slimkit.deploy.folder import FORMAT, read_manifest, understood, write_manifest
from slimkit.deploy.provenance import compare_versions, record, used_by
from slimkit.errors import ArtifactError, SlimkitError, in_one_line
from slimkit.interfaces import Grid, Scheme
from slimkit.parts import built, complete_, part_of
from slimkit.pruning.removal import remove_
from slimkit.pruning.report import PruningReport
from slimkit.quantization.fake import FakeQuantization, Fixed, QuantizedModel
from slimkit.quantization.sites import Sites
from slimkit.rewriting.changes import apply_
from slimkit.rewriting.report import RewritingReport, report_in

WEIGHTS, PROGRAM = "weights.safetensors", "model.pt2"


@dataclass
class Contents:
    """What goes into an artifact beside the files of the runtimes.

    Args:
        network: the compressed float model.
        quantized: backend -> its simulation, each around the same weights.
        model: import path and options of the function that builds the dense model, if known.
        program: the finished model as a graph, kept where no such function is known.
        recipe: the recipe as plain data.
        used: (kind, name) of plugins used beside those that the models themselves tell.
        options: backend -> the options of its constructor, where no recipe has them.
        metrics: whatever was measured, as plain data.
    """

    network: nn.Module
    quantized: Mapping[str, QuantizedModel] = field(default_factory=dict)
    model: Mapping[str, Any] | None = None
    program: torch.export.ExportedProgram | None = None
    recipe: Mapping[str, Any] | None = None
    used: list[tuple[str, str]] = field(default_factory=list)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


def write(directory: Path, contents: Contents) -> None:
    """Write weights and manifest into `directory`, beside what lies there already."""
    tensors = {f"model.{k}": v for k, v in contents.network.state_dict().items()}
    quantization = {}
    for backend, quantized in contents.quantized.items():
        fake = quantized.fake
        tensors |= {f"ranges.{backend}.{k}": v for k, v in _ranges(quantized).items()}
        quantization[backend] = {
            "scheme": _scheme_out(fake.scheme),
            "sites": _sites_out(fake.sites),
            "weights": quantized.choices[0],
            "activations": quantized.choices[1],
        }
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    try:
        save_file(plain, directory / WEIGHTS)
    except SafetensorError as error:  # which is how a full disk is told
        raise ArtifactError(f"{directory / WEIGHTS} cannot be written: {error}") from error
    (directory / WEIGHTS).chmod(0o644)  # safetensors makes it readable by its owner only
    if contents.program is not None:
        try:
            torch.export.save(contents.program, directory / PROGRAM)
        except (RuntimeError, OSError) as error:  # of PyTorch's zip writer
            raise ArtifactError(
                f"{directory / PROGRAM} cannot be written: {in_one_line(error)}"
            ) from error
    report: PruningReport | None = getattr(contents.network, "slimkit_pruning", None)
    rewriting: RewritingReport | None = getattr(contents.network, "slimkit_rewriting", None)
    write_manifest(
        directory,
        {
            "format": FORMAT,
            "model": contents.model,
            "recipe": contents.recipe,
            "plugins": record([*contents.used, *used_by(contents.network, contents.quantized)]),
            "options": contents.options,
            "metrics": contents.metrics,
            "rewriting": [] if rewriting is None else rewriting.as_list(),
            "pruning": None if report is None else asdict(report),
            "quantization": quantization,
        },
    )


def load(
    directory: str | Path,
    model: Callable[[], nn.Module] | nn.Module | None = None,
    *,
    backend: str | None = None,
) -> nn.Module:
    """The compressed module of an artifact, in evaluation mode, without Torch-Pruning or pickle.

    Args:
        directory: the artifact's folder; every file's hash is checked.
        model: the user's model function, or a module that it made; left out, the function that
            the recipe named. Where neither is known (an artifact of `slimkit.export`) the graph
            in the artifact is given back: it computes the same but cannot be trained on.
        backend: whose simulation to load, where the artifact was quantized for several; left out,
            the first.

    Returns:
        A `QuantizedModel` where the artifact is quantized, else the pruned float module.

    Raises:
        ArtifactError: a file is missing, damaged or changed, or does not fit the model.
    """
    folder = Path(directory)
    content = read_manifest(folder)
    with understood(folder):
        compare_versions(content.get("plugins", []))
        quantization = dict(content["quantization"])
        path = dict(content.get("recipe") or {}).get("network")
        rewriting = report_in(content["rewriting"]) if content.get("rewriting") else None
        report = None if content["pruning"] is None else _report_in(content["pruning"])
        if content.get("model") is not None:
            dict(content["model"])
    if backend is not None and backend not in quantization:
        known = ", ".join(quantization) or "no backend"
        raise ArtifactError(f"{folder} is quantized for {known}, not for {backend}")
    network = _network(content, model, path)
    if network is None:
        if not (folder / PROGRAM).is_file():
            raise ArtifactError(
                f"{folder} does not say which function builds its model, and holds no graph: "
                "pass model="
            )
        return _Graph(torch.export.load(folder / PROGRAM).module())
    if rewriting is not None:
        apply_(network, rewriting.changes)
        network.slimkit_rewriting = rewriting  # type: ignore[assignment]  # a plain attribute
    if report is not None:
        remove_(network, report.kept, report.attributes)
        network.slimkit_pruning = report  # type: ignore[assignment]  # a plain attribute
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    _load_state(network, _below(tensors, "model."), folder)
    network.eval()
    if not quantization:
        return network
    name = backend or next(iter(quantization))
    saved = quantization[name]
    try:
        with understood(folder):
            sites, scheme = _sites_in(saved["sites"]), _scheme_in(saved["scheme"])
            choices = saved["weights"], saved["activations"]
        fake = _fixed(sites, scheme, network, _below(tensors, f"ranges.{name}."))
    except (KeyError, RuntimeError) as error:
        raise ArtifactError(f"the ranges of {folder} do not fit the model: {error}") from error
    return QuantizedModel(network, fake, name, choices).eval()


def is_graph(module: nn.Module) -> bool:
    """Whether `load` gave the graph in the artifact, since nobody knew the model's function."""
    return isinstance(module, _Graph)


class _Graph(nn.Module):
    """A module around an exported graph, whose training flag may be set to evaluation."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *args: Any) -> Any:
        """What the graph computes; batches are run sample by sample."""
        return joined([self.graph(*samples_of(args, i, i + 1)) for i in range(samples_in(args))])

    def train(self, mode: bool = True) -> _Graph:
        """Refuse training: the graph was written down in evaluation mode."""
        if mode:
            raise SlimkitError(
                "this module is a graph in evaluation mode; pass model= to slimkit.load to get "
                "one that can be trained"
            )
        return self


def _network(
    content: Mapping[str, Any],
    model: Callable[[], nn.Module] | nn.Module | None,
    path: str | None,
) -> nn.Module | None:
    """What the user's function builds, or the part of it at `path`, before anything is cut."""
    if isinstance(model, nn.Module):
        return part_of(complete_(copied(model), path), path).cpu()
    if model is not None:
        made = model()
        if not isinstance(made, nn.Module):
            raise ArtifactError(f"model() must return an nn.Module, not {type(made).__name__}")
        return part_of(complete_(uncompiled_(made), path), path).cpu()
    if content.get("model"):
        return part_of(built(content["model"], path), path)
    return None


def _load_state(module: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        lines = "\n  ".join(str(error).splitlines()[1:4])
        raise ArtifactError(
            f"the weights of {folder} do not fit {type(module).__name__}; was the model changed "
            f"since the export?\n  {lines}"
        ) from error


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _ranges(quantized: QuantizedModel) -> dict[str, Tensor]:
    """Scale and zero point of every quantizer, weights' fitted to the weights as they are."""
    fake = quantized.fake
    parameters = dict(quantized.model.named_parameters(remove_duplicate=False))
    ranges = {}
    for name, (scale, zero_point) in fake.ranges(parameters).items():
        ranges[f"{name}.scale"], ranges[f"{name}.zero_point"] = scale, zero_point
    return ranges


def _names(fake: FakeQuantization) -> list[str]:
    return [*fake.sites.activations, *(name for name, _ in fake.sites.weights.values())]


def _fixed(
    sites: Sites, scheme: Scheme, network: nn.Module, ranges: Mapping[str, Tensor]
) -> FakeQuantization:
    """The fake-quantizers of a manifest with the ranges that were saved."""
    fake = FakeQuantization(
        sites,
        scheme,
        Fixed,
        Fixed,
        dict(network.named_parameters(remove_duplicate=False)),
    )
    for name in _names(fake):
        quantizer = fake[name]
        assert isinstance(quantizer, Fixed)
        quantizer.scale.copy_(ranges[f"{name}.scale"])
        quantizer.zero_point.copy_(ranges[f"{name}.zero_point"])
    fake.state = "quantize"
    return fake


def _report_in(saved: Mapping[str, Any]) -> PruningReport:
    kept = {t: {int(d): p for d, p in dims.items()} for t, dims in saved["kept"].items()}
    groups = {
        name: (before, after, list(on)) for name, (before, after, on) in saved["groups"].items()
    }
    before_after = {k: (saved[k][0], saved[k][1]) for k in ("macs", "parameters", "size_mb")}
    return PruningReport(
        groups,
        saved["frozen"],
        **before_after,
        kept=kept,
        attributes={
            path: {name: int(number) for name, number in numbers.items()}
            for path, numbers in saved.get("attributes", {}).items()
        },
        weights={n: (a, b) for n, (a, b) in saved.get("weights", {}).items()},
        criteria=tuple(saved.get("criteria", ())),
    )


def _scheme_out(scheme: Scheme) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(scheme), default=sorted))


def _scheme_in(saved: Mapping[str, Any]) -> Scheme:
    sets = {
        k: frozenset(saved.get(k, ())) for k in ("operations", "keeps", "fuses", "steps", "tables")
    }
    grids = {k: Grid(**saved[k]) for k in ("activations", "weights")}
    prescribed = tuple((op, scale, zero) for op, scale, zero in saved.get("prescribed", ()))
    return Scheme(**{**saved, **sets, **grids, "prescribed": prescribed})


def _sites_out(sites: Sites) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(sites)))


def _sites_in(saved: Mapping[str, Any]) -> Sites:
    inputs = {c: {int(n): q for n, q in reads.items()} for c, reads in saved["inputs"].items()}
    weights = {c: (q, p) for c, (q, p) in saved["weights"].items()}
    inner = dict(saved.get("inner", {}))
    return Sites(inputs, dict(saved["outputs"]), weights, dict(saved["skipped"]), inner)
