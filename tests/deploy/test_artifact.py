"""Export, and back: what an artifact holds is what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from models import Net
from nets import conv_norm, normal, residual_net
from safetensors import SafetensorError
from torch import nn

import slimkit
from slimkit.builtin.backends.reference import Reference
from slimkit.deploy.artifact import _scheme_in, _scheme_out
from slimkit.deploy.reopening import reopen
from slimkit.errors import ArtifactError, ExportError, SlimkitError
from slimkit.interfaces import Criterion, Runner
from slimkit.registry import discover

X = normal(6, 3, 8, 8, seed=3)
BACKENDS = ["torch", "onnxruntime", "ncnn"]


def pruned() -> nn.Module:
    return slimkit.prune(residual_net(), X, target={"flops": 0.5}).eval()


def quantized(model: nn.Module, backend: str) -> nn.Module:
    return slimkit.quantize(model, [normal(32, 3, 8, 8)], backend).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An int8 artifact of a pruned model, and the simulation that it was made from."""
    model = quantized(pruned(), "torch")
    artifact = slimkit.export(model, X, "torch", directory=tmp_path_factory.mktemp("e") / "small")
    return artifact, model


def copied(artifact, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    for source in artifact.directory.rglob("*"):
        if source.is_file():
            file = target / source.relative_to(artifact.directory)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(source.read_bytes())
    return target


def test_a_scheme_is_the_same_when_it_is_read_again() -> None:
    scheme = replace(
        discover().create("backend", "onnxruntime").scheme,
        rounds_outputs=True,
        prescribed=(("sigmoid", 1 / 256, -128),),
    )
    assert _scheme_in(_scheme_out(scheme)) == scheme


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float_model_goes_to_a_file_and_back(backend: str, tmp_path: Path) -> None:
    model = pruned()
    artifact = slimkit.export(model, X, backend, directory=tmp_path / "small")
    torch.testing.assert_close(artifact.run(X), model(X), rtol=1e-4, atol=1e-4)
    loaded = slimkit.load(tmp_path / "small", residual_net)
    assert torch.equal(loaded(X), model(X))
    assert artifact.agreement == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_int8_model_goes_to_a_file_and_back(backend: str, tmp_path: Path) -> None:
    model = quantized(pruned(), backend)
    artifact = slimkit.export(model, X, backend, directory=tmp_path / "small")
    assert torch.equal(slimkit.load(tmp_path / "small", residual_net)(X), model(X))
    error = (artifact.run(X) - model(X)).abs().max()
    assert error < 0.02 * model(X).abs().max()
    assert artifact.size_bytes == sum(
        p.stat().st_size for p in (tmp_path / "small" / "exports" / backend).iterdir()
    )


def test_a_module_serves_as_well_as_its_function_and_is_untouched(exported) -> None:
    artifact, model = exported
    given = residual_net()
    before = {k: v.clone() for k, v in given.state_dict().items()}
    assert torch.equal(slimkit.load(artifact.directory, given)(X), model(X))
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items())


def test_without_a_model_the_graph_in_the_artifact_computes_the_same(exported) -> None:
    artifact, _ = exported
    graph = slimkit.load(artifact.directory)
    assert torch.equal(graph(X), artifact.run(X))
    with pytest.raises(SlimkitError, match="pass model= to slimkit.load"):
        graph.train()


def test_a_loaded_module_can_be_exported_again(exported, tmp_path: Path) -> None:
    artifact, model = exported
    loaded = slimkit.load(artifact.directory, residual_net)
    slimkit.export(loaded, X, "torch", directory=tmp_path / "again")
    assert torch.equal(slimkit.load(tmp_path / "again", residual_net)(X), model(X))


def test_a_loaded_module_tells_what_was_pruned(exported) -> None:
    artifact, model = exported
    loaded = slimkit.load(artifact.directory, residual_net)
    assert str(loaded.model.slimkit_pruning) == str(model.model.slimkit_pruning)


def test_run_takes_batches_larger_than_the_files(exported) -> None:
    artifact, _ = exported
    one_by_one = torch.cat([artifact.run(x) for x in X.split(1)])
    assert torch.equal(artifact.run(X), one_by_one)


def structured() -> nn.Module:
    def flow(net, x):
        y = net.a(x)
        return {"both": (y, net.b(y)), "sum": [y.sum(1)]}

    return Net(flow, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 2, 3)).eval()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nested_outputs_come_back_in_their_structure(backend: str, tmp_path: Path) -> None:
    model = structured()
    artifact = slimkit.export(model, X, backend, directory=tmp_path / "small")
    torch.testing.assert_close(artifact.run(X), model(X), rtol=1e-4, atol=1e-4)


def test_several_inputs_are_split_together(tmp_path: Path) -> None:
    model = Net(lambda net, x, y: net.a(x) + y, a=nn.Linear(4, 3)).eval()
    inputs = (normal(5, 4), normal(5, 3))
    artifact = slimkit.export(model, inputs, "torch", directory=tmp_path / "small")
    torch.testing.assert_close(artifact.run(*inputs), model(*inputs))


def test_the_given_model_is_untouched_by_export(tmp_path: Path) -> None:
    model = conv_norm().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    slimkit.export(model, X, "torch", directory=tmp_path / "small")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())


def test_data_that_the_model_disagrees_on_counts(tmp_path: Path) -> None:
    artifact = slimkit.export(
        conv_norm(),
        X,
        "torch",
        directory=tmp_path / "small",
        data=[(X, None), (X, None)],
        batches=1,
    )
    assert artifact.row.agreement.inputs == 12


def test_a_model_quantized_for_another_arithmetic_is_refused(tmp_path: Path) -> None:
    model = quantized(conv_norm(), "ncnn")
    with pytest.raises(ExportError, match=r"quantized for ncnn.*backend='onnxruntime'"):
        slimkit.export(model, X, "onnxruntime", directory=tmp_path / "small")


@pytest.mark.parametrize("model", [None, residual_net])
def test_the_simulation_of_another_backend_cannot_be_loaded(exported, model) -> None:
    with pytest.raises(ArtifactError, match="is quantized for torch, not for ncnn"):
        slimkit.load(exported[0].directory, model, backend="ncnn")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (conv_norm, "was it built differently"),
        (lambda: None, "must return an nn.Module, not NoneType"),
        (lambda: nn.Sequential(residual_net()), "was it built differently"),
        (pruned, "was the model built differently"),
    ],
)
def test_another_model_is_refused(exported, model, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        slimkit.load(exported[0].directory, model)


def test_an_unpruned_artifact_refuses_another_model(tmp_path: Path) -> None:
    slimkit.export(conv_norm(), X, "torch", directory=tmp_path / "small")
    with pytest.raises(ArtifactError, match="do not fit Net; was the model changed"):
        slimkit.load(tmp_path / "small", residual_net)


def test_a_damaged_weights_file_is_named(exported, tmp_path: Path) -> None:
    folder = copied(exported[0], tmp_path)
    (folder / "weights.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors was changed"):
        slimkit.load(folder, residual_net)


def test_weights_that_are_no_safetensors_are_named_even_with_the_right_hash(
    exported, tmp_path: Path
) -> None:
    folder = copied(exported[0], tmp_path)
    (folder / "weights.safetensors").write_bytes(b"\0" * 64)
    manifest = json.loads((folder / "slimkit.json").read_text())
    from slimkit.deploy.folder import sha256

    manifest["files"]["weights.safetensors"] = sha256(folder / "weights.safetensors")
    (folder / "slimkit.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"weights\.safetensors cannot be read"):
        slimkit.load(folder, residual_net)


class Theirs(Criterion):
    """A criterion that no package registers."""

    def score(self, layer):
        return layer.weight.abs()


def plugins_in(folder: Path) -> dict[tuple[str, str], tuple[str | None, str | None]]:
    recorded = json.loads((folder / "slimkit.json").read_text())["plugins"]
    return {(p["kind"], p["name"]): (p["package"], p["version"]) for p in recorded}


def test_every_plugin_is_recorded_with_package_and_version(exported) -> None:
    ours = ("slimkit", version("slimkit"))
    assert plugins_in(exported[0].directory) == {
        ("backend", "torch"): ours,
        ("criterion", "l1"): ours,
        ("quantizer", "minmax"): ours,
        ("quantizer", "percentile"): ours,
    }


def test_saving_again_what_was_loaded_keeps_the_record(exported, tmp_path: Path) -> None:
    loaded = slimkit.load(exported[0].directory, residual_net)
    kinds = {kind for kind, _ in plugins_in(slimkit.save(loaded, tmp_path / "again"))}
    assert kinds == {"criterion", "quantizer"}


def test_instances_are_recorded_by_name_or_by_class(tmp_path: Path) -> None:
    once = slimkit.prune(residual_net(), X, Theirs(), target={"flops": 0.7})
    twice = slimkit.prune(once, X, "taylor", target={"flops": 0.8}, data=[(X, torch.arange(6) % 4)])
    backend = discover().create("backend", "torch")
    artifact = slimkit.export(twice, X, backend, directory=tmp_path / "small")
    assert plugins_in(artifact.directory) == {
        ("backend", "torch"): ("slimkit", version("slimkit")),
        ("criterion", f"{__name__}:Theirs"): (None, None),
        ("criterion", "taylor"): ("slimkit", version("slimkit")),
    }
    assert slimkit.load(artifact.directory, residual_net).slimkit_pruning.criteria == (
        f"{__name__}:Theirs",
        "taylor",
    )


def test_another_version_of_a_plugin_is_a_warning(exported, tmp_path: Path) -> None:
    folder = copied(exported[0], tmp_path)
    manifest = json.loads((folder / "slimkit.json").read_text())
    manifest["plugins"][0]["version"] = "0.0.1"
    (folder / "slimkit.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="backend torch was slimkit 0.0.1"):
        slimkit.load(folder, residual_net)


def test_a_failed_export_leaves_the_old_artifact(exported, tmp_path: Path) -> None:
    folder = copied(exported[0], tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    broken = Net(lambda net, x: net.a(x) if x.sum().item() > 0 else x, a=nn.Conv2d(3, 3, 1))
    with pytest.raises(ExportError):
        slimkit.export(broken, X, "torch", directory=folder)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


LOADS = """
import pickle, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch_pruning", "pytorch_lightning", "onnxruntime", "ncnn"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch, slimkit
import nets

def refuse(*args, **kwargs):
    raise AssertionError("pickle was used")

pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
model = slimkit.load(sys.argv[1], nets.residual_net)
x = nets.normal(6, 3, 8, 8, seed=3)
print(model(x).double().sum().item())
"""


def test_a_fresh_process_loads_without_torch_pruning_and_without_pickle(exported) -> None:
    artifact, model = exported
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOADS), str(artifact.directory)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(model(X).double().sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    "edit",
    [
        {"quantization": None},
        {"quantization": {"torch": {}}},
        {"quantization": {"torch": {"sites": {}, "scheme": {"later": 1}}}},
        {"pruning": {}},
        {"plugins": [{}]},
        {"plugins": 5},
        {"rewriting": [{}]},
        {"rewriting": 5},
        {"model": 3},
        {"recipe": [1]},
        {"files": {}},
        {"files": 5},
    ],
    ids=str,
)
def test_an_edited_manifest_is_one_error(exported, tmp_path, edit) -> None:
    folder = copied(exported[0], tmp_path)
    file = folder / "slimkit.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **edit}))
    with pytest.raises(ArtifactError, match=r"slimkit\.json (does not hold|is damaged)"):
        slimkit.load(folder, residual_net)
    with pytest.raises(ArtifactError):
        reopen(folder, residual_net)


@pytest.mark.parametrize("gone", ["quantization", "pruning"])
def test_a_manifest_that_lacks_a_part_is_one_error(exported, tmp_path, gone) -> None:
    folder = copied(exported[0], tmp_path)
    file = folder / "slimkit.json"
    content = json.loads(file.read_text())
    del content[gone]
    file.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=gone):
        slimkit.load(folder, residual_net)


def test_nothing_is_compared_on_what_is_no_number(tmp_path) -> None:
    net, sick = nn.Linear(4, 4), nn.Linear(4, 4)
    with pytest.raises(SlimkitError, match="hold NaN or infinity"):
        slimkit.export(net, torch.full((2, 4), torch.nan), "torch", directory=tmp_path / "a")
    sick.weight.data[0, 0] = torch.nan
    with pytest.raises(ExportError, match="weight of the model holds NaN or infinity"):
        slimkit.export(sick, torch.ones(2, 4), "torch", directory=tmp_path / "a")
    slimkit.export(net, torch.ones(2, 4), "torch", directory=tmp_path / "a")
    (opened,) = reopen(tmp_path / "a", net)
    with pytest.raises(SlimkitError, match="the data holds NaN"):
        opened.agreement([torch.full((2, 4), torch.nan)])


class Halved(Reference):
    """Gives a share of each output."""

    def __init__(self, *, share: float = 1.0, note: object = None) -> None:
        self.share, self.note = share, note

    def load(self, directory: Path, threads: int = 1) -> Runner:
        run = super().load(directory, threads)
        return lambda *inputs: [self.share * out for out in run(*inputs)]


def test_files_are_opened_with_the_options_that_they_were_made_with(tmp_path, monkeypatch) -> None:
    known = discover()
    monkeypatch.setattr(type(known), "name_of", lambda *_: "halved")
    made, asked = Halved(share=1.0000001), []
    monkeypatch.setattr(type(known), "create", lambda *given: asked.append(given[1:]) or made)
    slimkit.export(nn.Linear(4, 4), torch.ones(2, 4), made, directory=tmp_path / "a")
    (opened,) = reopen(tmp_path / "a")
    assert asked == [("backend", "halved", {"share": 1.0000001})] * 2  # when it was written, too
    assert opened.backend is made
    made.note = object()  # which JSON does not hold
    slimkit.export(nn.Linear(4, 4), torch.ones(2, 4), made, directory=tmp_path / "b")
    reopen(tmp_path / "b")
    assert asked[2:] == [("backend", "halved", {})]


def test_an_artifact_of_an_instance_is_opened_by_the_name_of_its_plugin(tmp_path) -> None:
    made = discover().create("backend", "torch")
    slimkit.export(nn.Linear(4, 4), torch.ones(2, 4), made, directory=tmp_path / "a")
    (opened,) = reopen(tmp_path / "a")
    assert opened.runtime == "torch"
    with pytest.raises(SlimkitError, match="the data does not fit the model"):
        opened.agreement([torch.ones(2, 5)])


def test_a_full_disk_under_the_weights_is_an_artifact_s_error(tmp_path, monkeypatch) -> None:
    def full(*_args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("slimkit.deploy.artifact.save_file", full)
    with pytest.raises(ArtifactError, match=r"weights.safetensors cannot be written: .*No space"):
        slimkit.save(nn.Linear(2, 2), tmp_path / "small")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("attributes", [{"a": 1}, {"a": {"b": "c"}}, 3])
def test_numbers_of_another_kind_in_a_manifest_are_told(tmp_path, attributes) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    small = slimkit.prune(net, torch.randn(1, 8), target={"flops": 0.5})
    path = slimkit.save(small, tmp_path / "small") / "slimkit.json"
    content = json.loads(path.read_text())
    content["pruning"]["attributes"] = attributes
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="it was edited"):
        slimkit.load(path.parent, model=lambda: net)
