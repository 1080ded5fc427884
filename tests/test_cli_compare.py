"""`slimkit compare` runs the files of an artifact against their simulation."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from nets import normal, residual_net

import slimkit
from slimkit.builtin.backends.reference import Reference
from slimkit.deploy.folder import write_manifest

X = normal(6, 3, 8, 8, seed=3)

THEIRS = """
import torch
from nets import normal, residual_net
from slimkit.builtin.backends.reference import Reference

def batches():
    return [(normal(4, 3, 8, 8, seed=n), torch.zeros(4)) for n in range(2)]

def once():
    return iter(batches())

def wrong():
    return [normal(4, 7, 8, 8)]

def empty():
    return []

def number():
    return 3
"""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A folder with an int8 and a float artifact, and the user's own module."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "theirs.py").write_text(THEIRS)
    net = residual_net().eval()
    int8 = slimkit.quantize(net, [normal(32, 3, 8, 8)], "torch").eval()
    slimkit.export(int8, X, "torch", directory=folder / "int8")
    slimkit.export(net, X, "torch", directory=folder / "float")
    slimkit.save(net, folder / "saved")
    # a file that was made of another model: the head's classes are shuffled
    other = residual_net().eval()
    other.head.weight.data = other.head.weight.data.flip(0)
    slimkit.export(other, X, "torch", directory=folder / "other")
    slimkit.export(net, X, "torch", directory=folder / "departed")
    file = "exports/torch/model.pt2"
    slimkit.export(int8, X, "torch", directory=folder / "int8-departed")
    for name in ("departed", "int8-departed"):
        (folder / name / file).write_bytes((folder / "other" / file).read_bytes())
        manifest = json.loads((folder / name / "slimkit.json").read_text())
        write_manifest(folder / name, manifest)  # hashes what lies there now
    return folder


@pytest.fixture
def compare(here, artifacts):
    return partial(here, artifacts, "compare")


@pytest.fixture
def compare_apart(artifacts):
    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "slimkit", "compare", *args],
            cwd=artifacts,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


DATA = ("--data", "theirs:batches")
MODEL = ("--model", "nets:residual_net")


def test_agreement_of_each_file_is_printed(compare_apart):
    done = compare_apart("int8", *DATA, *MODEL)
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()
    assert header.split()[:3] == ["runtime", "inputs", "agrees"]
    assert row.split()[:3] == ["torch", "8", "100.00%"]


def test_without_the_model_the_graph_in_the_artifact_is_compared(compare):
    done = compare("int8", "--data", "theirs:once")
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout


def test_layers_are_listed_in_order_with_a_verdict(compare):
    done = compare("int8", *DATA, *MODEL, "--per-layer")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("layer "))
    names = [line.split()[0] for line in lines[first + 1 : first + 7]]
    assert names == ["stem", "down", "up", "add", "mean", "head"]
    assert lines[-1].startswith(("No layer is below 20 dB", "Every layer equals"))


def test_a_file_that_departs_is_exit_code_3(compare):
    done = compare("departed", *DATA, *MODEL)
    assert done.returncode == 3
    assert "agreement: " in done.stderr
    assert "--per-layer finds the layer" in done.stderr


def test_a_processor_on_which_sums_of_the_weights_overflow_is_named(compare, monkeypatch):
    monkeypatch.setattr(Reference, "weight_bits", lambda self: 7)
    done = compare("int8-departed", *DATA, *MODEL)
    assert done.returncode == 3
    assert "torch: sums of products of 8-bit weights overflow on the processor" in done.stderr
    assert "overflow" not in compare("int8", *DATA, *MODEL).stderr  # nothing has departed
    assert "overflow" not in compare("departed", *DATA, *MODEL).stderr  # no integers


def test_a_real_file_that_is_not_what_would_be_made_now_is_said(compare):
    done = compare("departed", *DATA, *MODEL, "--per-layer")
    assert done.returncode == 3
    assert "does not compute what the real file does" in done.stdout


def test_json_holds_the_numbers_and_the_layers(compare):
    done = compare("float", *DATA, *MODEL, "--per-layer", "--inputs", "5", "--json")
    (found,) = json.loads(done.stdout)
    assert (found["runtime"], found["inputs"], found["agrees"]) == ("torch", 5, 1.0)
    assert [layer["layer"] for layer in found["per_layer"]["layers"]][-1] == "head (output)"
    assert found["per_layer"]["first"] is None


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["int8"], "does not say which data it was measured on: name it with --data"),
        (["nothing", *DATA], "is no slimkit artifact"),
        (["saved", *DATA], "holds no file for any runtime"),
        (["int8", *DATA, "--backend", "ncnn"], "holds files for torch, not for ncnn"),
        (["int8", *DATA, "--per-layer"], "name it with --model"),
        (["int8", "--data", "theirs:batch"], "did you mean 'batches'"),
        (["int8", "--data", "theirs"], "should look like 'package.module:function'"),
        (["int8", "--data", "theirs:empty", *MODEL], "the data is empty"),
        (["int8", "--data", "theirs:wrong", *MODEL], "the data does not fit the model"),
        (["int8", "--data", "theirs:number", *MODEL], "must give batches or a data module"),
        (["int8", *DATA, "--model", "theirs:number"], "must return a Module"),
    ],
)
def test_bad_input_is_exit_code_2_with_the_way_out(compare, args, said):
    done = compare(*args)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_changed_file_is_refused(compare, artifacts):
    file = artifacts / "float" / "exports" / "torch" / "model.pt2"
    good = file.read_bytes()
    file.write_bytes(good + b"0")
    try:
        done = compare("float", *DATA)
    finally:
        file.write_bytes(good)
    assert done.returncode == 2
    assert "was changed after the export" in done.stderr
