"""`slimkit run` as a user meets it: a fresh process, their own files, exit codes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from little_project import MODULE

from slimkit.recipe import Recipe
from slimkit.training.workplace import alone, prepare

VARIANTS = """
import functools
import signal
import sys


class Own(Data):
    def train_dataloader(self):
        own = torch.Generator().manual_seed(5)
        return DataLoader(self.train, 8, shuffle=True, generator=own)


class Sending(TensorDataset):
    asked = 0

    def __getitem__(self, index):
        Sending.asked += 1
        if "SIGNAL" in os.environ and Sending.asked == int(os.environ["AFTER"]):
            os.kill(os.getpid(), getattr(signal, "SIG" + os.environ["SIGNAL"]))
        return super().__getitem__(index)


class Signalling(Data):
    def __init__(self):
        super().__init__()
        self.train = Sending(*self.train.tensors)


class NoTraining(LightningDataModule):
    def val_dataloader(self):
        return Data().val_dataloader()


class NoEvaluation(LightningDataModule):
    def train_dataloader(self):
        return Data().train_dataloader()


class Empty(Data):
    def train_dataloader(self):
        return []


class Loud(Data):
    def prepare_data(self):
        print("Files already downloaded and verified")


class Breaking(Data):
    def train_dataloader(self):
        raise ValueError("no such folder: images/")


def circular():
    model = net()
    model[3].padding_mode = "circular"
    return model


class AgainstTheMean(nn.Sequential):
    def forward(self, x):
        x = super().forward(x)
        return x - x.mean(0)


class Asking(Data):
    def train_dataloader(self):
        return DataLoader(self.train, 8 // self.trainer.world_size)


def tiny():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def half():
    return net().bfloat16()


@functools.cache
def once():
    model = net()
    model[1].register_forward_pre_hook(
        lambda module, _: print("mode", module.training, file=sys.stderr)
    )
    return model


def against_the_mean():
    return AgainstTheMean(*net())


def raising():
    raise ValueError("no such backbone")


def wrong():
    return "a model"
"""

RECIPE = {
    "model": "mine:net",
    "data": "mine:Data",
    "task": "classification",
    "prune": {"criterion": "l1", "target": {"flops": 0.5}, "batchnorm_batches": 4},
    "quantize": {"train_from": 0.7},
    "export": ["torch"],
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
}


@pytest.fixture
def project(tmp_path: Path, here):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a process of its own, to the last bit
    yield Project(tmp_path, here)
    torch.set_num_threads(threads)


def heeding() -> None:
    """A child of a job in the background would ignore SIGINT, as its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Project:
    """A user's folder with a module and a recipe in it."""

    def __init__(self, folder: Path, here) -> None:
        self.folder, self._here = folder, here
        (folder / "mine.py").write_text(MODULE + VARIANTS)

    def write(self, **changes) -> None:
        recipe = {k: v for k, v in {**RECIPE, **changes}.items() if v is not None}
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "slimkit", "run", "recipe.yaml", "-o", "small", *args]

    def run(self, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args),
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            preexec_fn=heeding,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def here(self, *args: str):
        """The same without the seconds that a new process and the preflight take."""
        return self._here(self.folder, *self.command("--no-preflight", *args)[3:])

    def manifest(self, name: str = "small") -> dict:
        return json.loads((self.folder / name / "slimkit.json").read_text())

    def tree(self, name: str = "small") -> dict[str, bytes]:
        root = self.folder / name
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_run_trains_exports_and_measures(project: Project) -> None:
    project.write(export=["onnxruntime"])
    done = project.run("--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [row["stage"] for row in said["rows"]] == ["dense", "compressed", "int8"]
    dense, _, int8 = said["rows"]
    assert int8["macs"] <= 0.51 * dense["macs"]
    assert said["metric"] == "val_accuracy"
    assert said["directory"] == "small"
    assert set(project.manifest()["files"]) == set(project.tree()) - {"slimkit.json"}
    assert {"report.html", "recipe.yaml", "weights.safetensors"} <= set(project.tree())


def test_no_epochs_prune_at_once_and_quantize_after(project: Project) -> None:
    project.write()
    done = project.here("--epochs", "0")
    assert done.returncode == 0, done.stderr
    assert "pruned at once to" in done.stderr
    rows = project.manifest()["metrics"]["rows"]
    assert [row["label"] for row in rows] == ["dense", "pruned", "int8, deployed"]


@pytest.mark.parametrize("criterion", ["taylor", "hessian", "wanda"])
def test_a_criterion_with_data_prunes_at_once(project: Project, criterion: str) -> None:
    prune = {"criterion": criterion, "target": {"flops": 0.5}}
    project.write(prune=prune, quantize=None, trainer={"max_epochs": 0, "accelerator": "cpu"})
    done = project.here()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("criterion", ["l1", "taylor"])
def test_no_epochs_zero_weights_at_once(project: Project, criterion: str) -> None:
    prune = {"granularity": "2:4", "criterion": criterion}
    project.write(prune=prune, quantize=None, trainer={"max_epochs": 0, "accelerator": "cpu"})
    done = project.here()
    assert done.returncode == 0, done.stderr
    assert "50.0% of the weights are zero" in done.stderr
    weights = project.manifest()["pruning"]["weights"]
    assert weights
    assert all(kept == count / 2 for count, kept in weights.values())


def test_no_epochs_prune_by_ratios_alone(project: Project) -> None:
    prune = {"ratios": {"0": 0.25}, "ranking": "isomorphic", "max_ratio": [0.2, 0.6]}
    project.write(prune=prune, quantize=None, trainer=AT_ONCE, export=["onnxruntime"])
    done = project.here()
    assert done.returncode == 0, done.stderr
    groups = project.manifest()["pruning"]["groups"]
    assert {name: group[:2] for name, group in groups.items()} == {"0": [48, 40], "3": [64, 64]}


def test_the_same_recipe_and_seed_give_the_same_weights_ranges_and_metric(
    project: Project,
) -> None:
    project.write()
    assert project.here("-o", "one").returncode == 0
    assert project.here("-o", "two").returncode == 0
    one, two = project.manifest("one"), project.manifest("two")
    assert one["pruning"]["kept"] == two["pruning"]["kept"]
    name = "weights.safetensors"  # weights and ranges
    assert one["files"][name] == two["files"][name]
    metrics = [[row["metric"] for row in m["metrics"]["rows"]] for m in (one, two)]
    assert metrics[0] == metrics[1]


def test_a_missed_gate_exits_with_3_and_leaves_the_last_good_artifact(project: Project) -> None:
    project.write(trainer={"max_epochs": 0, "accelerator": "cpu"})
    assert project.here().returncode == 0
    good = project.tree()
    project.write(trainer={"max_epochs": 0, "accelerator": "cpu"}, gates={"size_ratio": 0.001})
    done = project.here("--json")
    assert done.returncode == 3
    assert "size_ratio: " in done.stderr
    assert json.loads(done.stdout)["directory"] == "small.rejected"
    assert project.tree() == good
    assert project.manifest("small.rejected")["metrics"]["missed"]
    assert sorted(p.name for p in project.folder.glob(".small*")) == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"data": "mine:Own", "quantize": {"calibration_batches": 2}}, marks=pytest.mark.slow
        ),
    ],
    ids=["trained on integers", "calibrated afterwards"],
)
def test_a_killed_run_goes_on_with_the_same_command(project: Project, changes) -> None:
    project.write(trainer={"max_epochs": 4, "accelerator": "cpu"}, **changes)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SLEEP": "0.02"}
    with subprocess.Popen(
        project.command(), cwd=project.folder, env=environment, stderr=subprocess.DEVNULL
    ) as process:
        checkpoint = project.folder / "small.work" / "last.ckpt"
        until = time.monotonic() + 60
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)  # into the next epoch
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert checkpoint.exists()
    assert not (project.folder / "small").exists()
    done = project.here()
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert "epoch 1/4" not in done.stderr
    assert "epoch 4/4" in done.stderr  # the kill came in the middle of the training
    assert not checkpoint.exists()
    resumed = project.manifest()["files"]["weights.safetensors"]
    assert project.here("--fresh", "-o", "whole").returncode == 0
    assert project.manifest("whole")["files"]["weights.safetensors"] == resumed


def test_a_run_killed_while_ranges_are_learned_goes_on(project: Project) -> None:
    quantize = {"train_from": 0.25, "weights": "lsq", "activations": "lsq", "weight_bits": 4}
    project.write(
        trainer={"max_epochs": 4, "accelerator": "cpu"},
        prune=None,
        quantize=quantize,
        optimizer={"name": "adamw", "lr": 0.01},
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SLEEP": "0.02"}
    with subprocess.Popen(
        project.command(), cwd=project.folder, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        said = next((line for line in process.stderr if "epoch 2/4  quantization" in line), "")
        time.sleep(0.3)  # into the next epoch
        process.send_signal(signal.SIGKILL)
    assert said
    assert process.returncode == -signal.SIGKILL
    assert not (project.folder / "small").exists()
    done = project.here()
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert "epoch 2/4" not in done.stderr
    resumed = project.manifest()["files"]["weights.safetensors"]
    assert project.here("--fresh", "-o", "whole").returncode == 0
    assert project.manifest("whole")["files"]["weights.safetensors"] == resumed


def test_another_recipe_does_not_go_on_from_the_old_checkpoint(project: Project) -> None:
    project.write(trainer={"max_epochs": 1, "accelerator": "cpu"})
    work = project.folder / "small.work"
    work.mkdir()
    (work / "last.ckpt").write_bytes(b"of another recipe")
    (work / "recipe.sha256").write_text("0" * 64)
    done = project.here()
    assert done.returncode == 0, done.stderr
    assert "going on" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model: is required"),
        ({"data": None}, "data: is required"),
        ({"model": "mine:nett"}, "has no 'nett'; did you mean 'net'"),
        ({"model": "mine:raising"}, "mine:raising() failed: ValueError: no such backbone"),
        ({"model": "mine:wrong"}, "must return a Module, but returned str"),
        ({"data": "mine:net"}, "must return a LightningDataModule, but returned Sequential"),
        ({"task": None}, "Sequential is no LightningModule"),
        ({"weights": "none.pt"}, "there is no file 'none.pt'"),
        ({"weights": "mine.py"}, "mine.py cannot be loaded into the model"),
        ({"weights": "list.pt"}, "it holds a list, not a state dict"),
        ({"weights": "other.pt"}, "Missing key"),
        ({"weights": "text.safetensors"}, "text.safetensors cannot be loaded into the model"),
        ({"data": "mine:NoTraining"}, "NoTraining has no train_dataloader"),
        ({"data": "mine:NoEvaluation"}, "neither a test nor a validation loader"),
        ({"data": "mine:Breaking"}, "ValueError: no such folder: images/"),
        ({"metric": "val_acuracy"}, "logs no 'val_acuracy'; did you mean 'val_accuracy'"),
        ({"trainer": {"max_epochs": 1, "devices": 999, "accelerator": "gpu"}}, "Lightning"),
        ({"prune": {**RECIPE["prune"], "protect": ["nothing"]}}, "no layer of the model"),
    ],
)
def test_bad_input_exits_with_2_and_says_what(project: Project, changes, message: str) -> None:
    torch.save([1, 2], project.folder / "list.pt")
    torch.save({"state_dict": {"weight": torch.ones(1)}}, project.folder / "other.pt")
    (project.folder / "text.safetensors").write_text("no tensors here")
    project.write(**changes)
    done = project.here("--epochs", "0") if "trainer" not in changes else project.here()
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "bug in slimkit" not in done.stderr
    assert not (project.folder / "small").exists()


def test_wrong_arguments_of_the_trainer_are_said_before_anything_takes_time(
    project: Project,
) -> None:
    project.write(model="mine:raising", trainer={"max_epochs": 1, "precision": "int3"})
    done = project.here("--preflight")
    assert done.returncode == 2, done.stderr
    assert "trainer: Lightning refuses these arguments" in done.stderr
    assert "int3" in done.stderr
    assert "no such backbone" not in done.stderr


def test_what_no_backend_can_run_is_said_before_anything_is_trained(project: Project) -> None:
    project.write(model="mine:circular", export=["torch", "ncnn"], pretrain={"max_epochs": 1})
    done = project.here("--preflight")
    assert done.returncode == 2, done.stderr
    assert "ncnn: the file of Ncnn computes something else than the model" in done.stderr
    assert "\n  torch: " not in done.stderr
    assert "training the dense model" not in done.stderr
    assert project.here("--epochs", "1").returncode == 2  # at its end
    assert (project.folder / "small.work" / "last.ckpt").exists()
    project.write(model="mine:circular", pretrain={"max_epochs": 1}, quantize=None)
    assert project.here("--epochs", "1").returncode == 0  # for another backend


@pytest.mark.parametrize("section", [{}, {"train_from": 0.7}])
def test_a_model_that_is_too_small_for_int8_is_said_before_anything_is_trained(
    project: Project, section
) -> None:
    project.write(model="mine:tiny", quantize=section)
    done = project.here("--preflight")
    assert done.returncode == 2, done.stderr
    assert "torch, int8: " in done.stderr
    assert "quantization saves nothing" in done.stderr
    assert "epoch 1" not in done.stderr
    project.write(model="mine:tiny", quantize=None)
    assert project.here("--preflight", "--epochs", "1").returncode == 0


def test_a_trained_run_goes_on_without_a_backend_that_cannot_run_it(project: Project) -> None:
    project.write(model="mine:circular", export=["torch", "ncnn"], quantize=None)
    done = project.here()
    assert "misread" in done.stderr  # by ncnn, after the training
    assert "what is trained is kept in" in done.stderr
    project.write(model="mine:circular", quantize=None)
    done = project.here()
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert "epoch 2" not in done.stderr


@pytest.mark.parametrize(
    ("before", "after", "stays"),
    [("ncnn", "torch", True), ("torch", "ncnn", False), ("ncnn", "onnxruntime", True)],
)
def test_only_channels_that_suit_the_new_backend_are_gone_on_with(
    tmp_path: Path, before: str, after: str, stays: bool
) -> None:
    said: list[str] = []
    for backend in (before, after):
        recipe = Recipe.model_validate({**RECIPE, "quantize": None, "export": [backend]})
        with alone(tmp_path / "o.work"):
            prepare(recipe, tmp_path / "o", tmp_path / "o.work", False, said.append)
            if backend == before:
                (tmp_path / "o.work" / "last.ckpt").write_bytes(b"trained")
    assert (tmp_path / "o.work" / "last.ckpt").exists() == stays
    assert (tmp_path / "o.work.old" / "last.ckpt").exists() != stays
    assert bool(said) != stays


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "mine:Asking"}, "cannot be tried before there is a Trainer: AttributeError"),
        ({"model": "mine:half", "trainer": {"precision": "bf16-true"}}, ""),
    ],
)
def test_what_the_training_can_do_is_not_refused_before_it(project: Project, changes, said) -> None:
    own = {"max_epochs": 1, "accelerator": "cpu", **changes.pop("trainer", {})}
    project.write(quantize=None, trainer=own, **changes)
    done = project.here("--preflight")
    assert done.returncode == 0, done.stderr
    assert said in done.stderr


def test_the_preflight_leaves_the_model_as_it_is(project: Project) -> None:
    project.write(model="mine:once", quantize=None, distill=False)
    done = project.here("--preflight")
    assert done.returncode == 0, done.stderr
    assert "mode True" in done.stderr  # of the very model that the preflight was given


def test_samples_that_depend_on_each_other_are_said_before_training(project: Project) -> None:
    project.write(model="mine:against_the_mean", prune=None, quantize={}, distill=False)
    done = project.here("--preflight")
    assert done.returncode == 2, done.stderr
    assert "computes something else of a sample alone than of two together" in done.stderr
    assert "epoch 1" not in done.stderr


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        (
            {"teacher": {"name": "mine:net", "options": {"classes": 7}}},
            "4 classes and the teacher 7",
        ),
        ({"losses": [{"name": "hint", "at": "33"}]}, "has no module '33'; did you mean '3'"),
        ({"losses": [{"name": "cwd"}]}, "must be maps (batch, channels, *positions)"),
        ({"losses": [{"name": "kl", "at": "output.logits"}]}, "in which there is no .logits"),
    ],
)
def test_wrong_distillation_is_said_before_the_dense_model_is_trained(
    project: Project, distill, message: str
) -> None:
    project.write(distill=distill, pretrain={"max_epochs": 1})
    done = project.here()
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "training the dense model" not in done.stderr


def test_looking_before_a_training_changes_nothing(project: Project, monkeypatch) -> None:
    project.write(pretrain={"max_epochs": 1})
    assert project.here("-o", "one", "--preflight").returncode == 0
    monkeypatch.setattr("slimkit.training.run.rehearse", lambda *args: None)
    assert project.here("-o", "two").returncode == 0
    name = "weights.safetensors"
    assert project.manifest("one")["files"][name] == project.manifest("two")["files"][name]


def test_empty_training_data_exits_with_2(project: Project) -> None:
    project.write(data="mine:Empty", trainer={"max_epochs": 0, "accelerator": "cpu"})
    done = project.here()
    assert done.returncode == 2
    assert "the training data is empty" in done.stderr


def test_a_foreign_output_folder_is_refused_before_training(project: Project) -> None:
    (project.folder / "small").mkdir()
    (project.folder / "small" / "thesis.tex").write_text("important")
    project.write()
    done = project.here()
    assert done.returncode == 2
    assert "will not replace" in done.stderr
    assert "epoch" not in done.stderr
    assert project.tree() == {"thesis.tex": b"important"}


def test_two_runs_may_end_and_begin_at_once(tmp_path: Path, monkeypatch) -> None:
    acquire, gone = FileLock.acquire, []

    def ended(lock: FileLock, **options: float) -> object:
        if not gone:  # by the end of the run that held it
            gone.append(Path(lock.lock_file).parent)
            gone[0].rmdir()
        return acquire(lock, **options)

    monkeypatch.setattr(FileLock, "acquire", ended)
    with alone(tmp_path / "o.work"):
        assert (tmp_path / "o.work").is_dir()
    assert gone


def test_quiet_says_nothing_but_the_result(project: Project) -> None:
    project.write(trainer={"max_epochs": 1, "accelerator": "cpu"}, data="mine:Loud")
    done = project.here("--quiet", "--json")
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.splitlines()) == {"Files already downloaded and verified"}
    json.loads(done.stdout)


def test_sigterm_is_not_blamed_on_the_plugin_at_work(project: Project, monkeypatch) -> None:
    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    project.write(trainer=AT_ONCE, quantize=None)
    monkeypatch.setattr("slimkit.builtin.backends.reference.Reference.compile", stopped)
    done = project.here()
    assert done.returncode == 143, done.stderr
    assert "Error: stopped by SIGTERM" in done.stderr
    assert "failed while" not in done.stderr


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        pytest.param(
            *("TERM", 143, "Error: stopped by SIGTERM: the same command goes on from"),
            marks=pytest.mark.slow,
        ),
        ("INT", 130, "Interrupted."),
    ],
)
def test_a_run_that_is_stopped_says_so_and_goes_on(
    project: Project, name: str, code: int, said: str
) -> None:
    """In the second epoch of the dense model's training."""
    project.write(
        data="mine:Signalling",
        pretrain={"max_epochs": 3},
        trainer={"max_epochs": 1, "accelerator": "cpu"},
    )
    done = project.run("-q", SIGNAL=name, AFTER="100")
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project.folder / "small").exists()
    done = project.here()
    assert done.returncode == 0, done.stderr
    assert f"going on from {Path('small.work/pretrain.ckpt')}" in done.stderr
    assert "epoch 1/3" not in done.stderr
    assert "epoch 3/3" in done.stderr
    assert [path.name for path in (project.folder / "small.work").iterdir()] == ["logs"]


SHORT = {"max_epochs": 1, "accelerator": "cpu"}
AT_ONCE = {"max_epochs": 0, "accelerator": "cpu"}


def test_sigterm_while_files_are_made_leaves_nothing_half_written(
    project: Project, monkeypatch
) -> None:
    seen, before = [], signal.getsignal(signal.SIGTERM)

    def stopped(*args, **kwargs):
        seen.extend(project.folder.glob("..small.new-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    project.write(trainer=AT_ONCE, quantize=None)
    with monkeypatch.context() as patch:
        patch.setattr("slimkit.training.deployment.release", stopped)
        done = project.here()
    assert done.returncode == 143
    assert "Error: stopped by SIGTERM" in done.stderr
    assert len(seen) == 1
    assert sorted(path.name for path in project.folder.iterdir() if "small" in path.name) == [
        "small.work"
    ]
    assert project.here().returncode == 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_a_killed_export_left_is_removed(project: Project) -> None:
    names = [f"..small.new{end}" for end in ("-ab3_5xyz", "-ab3_5xyz-old", "-mine", "er")]
    for name in names:
        (project.folder / name).mkdir()
    project.write(trainer=AT_ONCE, quantize=None)
    assert project.here().returncode == 0
    assert [(project.folder / name).exists() for name in names] == [False, False, True, True]


def test_two_runs_into_one_folder_are_kept_apart(project: Project, monkeypatch) -> None:
    monkeypatch.setattr("slimkit.training.workplace._PATIENCE_S", 0.2)
    project.write(trainer=AT_ONCE, quantize=None)
    work = project.folder / "small.work"
    work.mkdir()
    (work / "last.ckpt").write_bytes(b"of the other")
    with (work / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = project.here("--fresh")
    assert done.returncode == 2
    assert "another run is at work in small.work: wait for its end, or choose" in done.stderr
    assert (work / "last.ckpt").read_bytes() == b"of the other"
    assert project.here("--fresh").returncode == 0
    assert not work.exists()  # there were no epochs, and so no logs


def test_what_training_does_not_depend_on_may_change_while_it_is_unfinished(
    project: Project,
) -> None:
    changes = {"quantize": {}, "distill": False, "prune": None, "trainer": SHORT}
    project.write(**changes, metric="val_acuracy")
    done = project.here()
    assert done.returncode == 2
    assert "did you mean 'val_accuracy'" in done.stderr
    project.write(**changes, gates={"accuracy_drop": 0.9}, export=["torch"])
    done = project.here()
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert "epoch 1/1" not in done.stderr


def test_what_another_recipe_has_trained_is_set_aside(project: Project) -> None:
    project.write(metric="val_acuracy", trainer=SHORT)
    assert project.here().returncode == 2
    project.write(trainer={**SHORT, "seed": 1})
    done = project.here()
    assert done.returncode == 0, done.stderr
    assert "starting over: the unfinished run in small.work was of a recipe that" in done.stderr
    assert (project.folder / "small.work.old" / "last.ckpt").is_file()


def test_a_model_that_changed_since_is_refused(project: Project) -> None:
    project.write(metric="val_acuracy", trainer=SHORT)
    assert project.here().returncode == 2
    mine = project.folder / "mine.py"
    mine.write_text(mine.read_text().replace("64, 3, padding", "56, 3, padding"))
    mine.write_text(mine.read_text().replace("BatchNorm2d(64)", "BatchNorm2d(56)"))
    mine.write_text(mine.read_text().replace("Linear(64", "Linear(56"))
    done = project.here()
    assert done.returncode == 2
    assert "the model has changed since the training in small.work began: 3.weight" in done.stderr
    assert "--fresh" in done.stderr


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "half", "other"])
@pytest.mark.parametrize("name", ["last.ckpt", "pretrain.ckpt", "dense.safetensors"])
def test_a_damaged_checkpoint_is_one_error(project: Project, name: str, content) -> None:
    project.write(pretrain={"max_epochs": 1}, metric="val_acuracy", trainer=SHORT)
    assert project.here("--epochs", "1").returncode == 2
    file = project.folder / "small.work" / name
    if name == "pretrain.ckpt":
        (file.with_name("dense.safetensors")).unlink()
    whole = file.read_bytes() if file.is_file() else (file.with_name("last.ckpt")).read_bytes()
    if content == "half":
        content = whole[: len(whole) // 2]
    if content == "other":
        torch.save([1, 2], file)
    else:
        file.write_bytes(content)
    done = project.here("--epochs", "1")
    assert done.returncode == 2, done.stderr
    assert f"small.work/{name}" in done.stderr
    assert "--fresh" in done.stderr
    assert "bug in slimkit" not in done.stderr


def test_a_training_that_diverges_is_no_artifact(project: Project) -> None:
    project.write(prune=None, quantize={}, export=["torch"], optimizer={"lr": 1e30})
    done = project.here()
    assert done.returncode == 2
    assert "the training diverged: model.0.weight holds NaN or infinity after epoch 1" in (
        done.stderr
    )
    assert not (project.folder / "small").exists()


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"strategy": "dpp"}, "dpp"),
        ({"precision": "bf17"}, "bf17"),
        ({"val_check_interval": 1000}, "val_check_interval"),
        ({"accumulate_grad_batches": 0}, "ZeroDivisionError"),
        ({"strategy": "ddp_spawn"}, "use strategy: ddp"),
        ({"strategy": "fsdp"}, "requires a GPU"),
        ({"barebones": True}, "barebones"),
        ({"logger": "csv"}, "trainer: logger: must be true or false"),
        ({"callbacks": ["EarlyStopping"]}, "trainer: callbacks: a recipe cannot name them"),
    ],
)
def test_trainer_arguments_that_lightning_refuses_are_bad_input(
    project: Project, trainer, said: str
) -> None:
    project.write(trainer={**SHORT, **trainer})
    done = project.here()
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "bug in slimkit" not in done.stderr
