"""`slimkit prune` cuts a model of the user's at once, or only shows the plan."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch

import slimkit
from slimkit.demo.digits import resnet

NET = ("slimkit.demo.digits:resnet", "--input", "1,1,8,8")


@pytest.fixture
def prune(here, tmp_path):
    """Runs `slimkit prune` in a fresh folder."""
    return partial(here, tmp_path, "prune")


@pytest.fixture
def prune_apart(tmp_path):
    """The same in a process of its own."""

    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "slimkit", "prune", *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


def test_the_small_model_is_saved_and_loads_by_the_function_s_path(prune_apart, tmp_path):
    torch.save(resnet().state_dict(), tmp_path / "dense.pt")
    done = prune_apart(*NET, "--weights", "dense.pt", "-o", "small", "--target", "flops=0.4")
    assert done.returncode == 0, done.stderr
    assert "saved to small: slimkit.load('small') gives it back" in done.stdout
    small = slimkit.load(tmp_path / "small")
    before, after = small.slimkit_pruning.macs
    assert 0.35 < after / before <= 0.41
    assert small(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_the_plan_lists_groups_and_reasons_and_writes_nothing(prune, tmp_path):
    done = prune(*NET, "--plan")
    assert done.returncode == 0, done.stderr
    assert "stage2.0.conv1 " in done.stdout
    assert "left whole: its channels are the model's output" in done.stdout
    assert [*tmp_path.iterdir()] == []


def test_the_same_command_without_plan_cuts_what_the_plan_says(prune):
    plan, done = (json.loads(prune(*NET, "--json", *more).stdout) for more in (("--plan",), ()))
    assert plan == {name: value for name, value in done.items() if name != "directory"}


def test_the_plan_as_json(prune):
    plan = json.loads(prune(*NET, "--plan", "--json", "--protect", "stage1.0.conv?").stdout)
    assert plan["left_whole"]["stage1.0.conv1"] == "protected by 'stage1.0.conv?'"
    assert plan["groups"]["stage2.0.conv1"]["channels"] == 128
    assert plan["macs"]["after"] <= 0.51 * plan["macs"]["before"]


def test_ratios_limits_and_rankings_reach_the_plan(prune):
    plan = json.loads(prune(*NET, "--plan", "--json", "--ratio", "stage1.?.conv1=0.25").stdout)
    kept = {name: group["kept"] for name, group in plan["groups"].items()}
    assert (kept["stage1.0.conv1"], kept["stage1.1.conv1"], kept["conv"]) == (48, 48, 64)
    local = ("--target", "params=0.5", "--ranking", "local", "--max-ratio", "0.9,0.9")
    groups = json.loads(prune(*NET, "--plan", "--json", *local).stdout)["groups"].values()
    shares = [group["kept"] / group["channels"] for group in groups]
    assert max(shares) - min(shares) < 0.05


MODELS = """
import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.out = 4, nn.Linear(16, 96), nn.Linear(32, 16)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def vit():
    return nn.Sequential(nn.Linear(16, 16), Attention(), nn.Linear(16, 3))


def batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 1, 8, 8, generator=generator)
    return [(images, torch.randint(0, 10, (32,), generator=generator))] * 2
"""


def test_whole_heads_go(prune, tmp_path):
    (tmp_path / "mine.py").write_text(MODELS)
    vit = ("mine:vit", "--input", "1,5,16", "--plan", "--json", "--ratio", "1.qkv=0.25")
    plan = json.loads(prune(*vit, "--attention", "heads").stdout)
    assert (plan["groups"]["1.qkv"]["channels"], plan["groups"]["1.qkv"]["kept"]) == (4, 3)
    assert plan["attributes"] == {"1": {"heads": 3}}


def test_data_gives_gradients(prune, tmp_path):
    (tmp_path / "mine.py").write_text(MODELS)
    done = prune(*NET, "-c", "taylor", "--data", "mine:batches", "-o", "small")
    assert done.returncode == 0, done.stderr
    assert slimkit.load(tmp_path / "small").slimkit_pruning.macs[1] > 0


def test_a_backend_rounds_channels(prune):
    def kept(*args):
        groups = json.loads(prune(*NET, "--plan", "--json", *args).stdout)["groups"].values()
        return [group["kept"] for group in groups]

    assert any(count % 8 for count in kept())
    assert not any(count % 8 for count in kept("--backend", "ncnn", "-b", "onnxruntime"))
    assert any(count % 8 for count in kept("--backend", "ncnn", "--round-to", "1"))


def test_token_ids_are_whole_numbers(prune, tmp_path):
    (tmp_path / "tokens.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 4))\n"
    )
    done = prune("tokens:net", "--input", "1,12:int64", "--plan")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("digits", "-i", "1"), "should look like 'package.module:function', not 'digits'"),
        ((*NET, "--target", "half"), "should be such as flops=0.5, not 'half'"),
        ((*NET, "--ratio", "stage1"), "should be such as layer1=0.3, not 'stage1'"),
        ((*NET, "--ratio", "stage9=0.5"), "no layer of the model is called 'stage9'"),
        ((*NET, "--max-ratio", "much"), "should be such as 0.6 or 0.2,0.6, not 'much'"),
        ((*NET, "--max-ratio", "0.1,0.1"), "max_ratio"),
        ((*NET, "--target", "flop=0.5"), "target must name exactly one of"),
        (("slimkit.demo.digits:resnet", "-i", "1,1,x"), "should be sizes such as 1,3,224,224"),
        (("slimkit.demo.digits:resnet", "-i", "1,1:f3"), "torch has no type 'f3'"),
        (("slimkit.demo.digits:resnett", "-i", "1"), "did you mean 'resnet'?"),
        ((*NET, "--weights", "gone.pt"), "'gone.pt' does not exist"),
        ((*NET, "--output", "full"), "will not replace it"),
        ((*NET, "-c", "taylor"), "needs gradients: pass data= (--data on the command line)"),
        ((*NET, "--data", "digits"), "should look like 'package.module:function', not 'digits'"),
        ((*NET, "--backend", "ncnnn"), "no backend is called 'ncnnn'; did you mean 'ncnn'?"),
    ],
)
def test_bad_input_exits_with_2_and_says_what(prune, tmp_path, args, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "theirs").touch()
    done = prune(*args)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_weights_can_be_zeroed_two_of_four(prune, tmp_path):
    done = prune(*NET, "--granularity", "2:4", "-o", "small")
    assert done.returncode == 0, done.stderr
    assert "50.0% of 36,864 weights are zero" in done.stdout
    weight = slimkit.load(tmp_path / "small").stage1[0].conv1.weight
    assert ((weight.unflatten(1, (-1, 4)) == 0).sum(2) == 2).all()


def test_blocks_have_a_size_and_a_target_of_their_own(prune):
    args = ("--granularity", "block", "--block-size", "2", "2", "-t", "ratio=0.75", "--plan")
    plan = json.loads(prune(*NET, *args, "--json").stdout)
    weights, kept = (sum(w[k] for w in plan["weights"].values()) for k in ("weights", "kept"))
    assert kept / weights == pytest.approx(0.25, abs=0.001)
    done = prune(*NET, "--block-size", "2", "2")
    assert done.returncode == 2
    assert "needs --granularity block" in done.stderr


def test_gammas_are_shown_before_the_plan(prune, tmp_path):
    dense = resnet()
    dense.bn.weight.data[:16] = 0
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    done = prune(*NET, "--plan", "--gammas", "--weights", "dense.pt")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("bn "))
    assert row.split()[1:6] == ["64", "0", "1", "1", "25%"]
    assert done.stdout.index("bn ") < done.stdout.index("MACs")
