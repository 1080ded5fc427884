"""`check` finds every problem at once, and imports neither the model nor torch."""

import subprocess
import sys
from importlib import invalidate_caches

import pytest
import yaml

from slimkit import check, registry

MODELS = """
raise SystemExit("imported")

def resnet(depth: int, *, width: float | None = None, norm: Norm = None, kind: "Missing" = ""): ...

def open_ended(**options): ...

resnet56 = partial(resnet, depth=56)
"""

BACKEND = """
from slimkit.hookspecs import Plugin, hookimpl

@hookimpl
def slimkit_backends():
    yield Plugin("gone", "no_such_package.backend:Gone", "Its module is not there")
    yield Plugin("renamed", "their_backend:Old", "Its class is not there")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "their_models.py").write_text(MODELS)
    (tmp_path / "their_data.py").write_text("def cifar(): ...")
    (tmp_path / "their_backend.py").write_text(BACKEND + "\nclass New: ...\n")
    info = tmp_path / "slimkit_theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slimkit-theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[slimkit]\ntheirs = their_backend\n")
    invalidate_caches()
    registry.discover.cache_clear()
    yield tmp_path
    registry.discover.cache_clear()
    sys.modules.pop("their_backend", None)


def found(here, **changes):
    """Problems by path, of a good recipe with changes."""
    good = {
        "model": "their_models:resnet56",
        "data": "their_data:cifar",
        "prune": {"criterion": "l1", "target": {"flops": 0.5}},
        "export": ["torch"],
    }
    path = here / "recipe.yaml"
    path.write_text(yaml.safe_dump({**good, **changes}))
    return {problem.path: problem.message for problem in check.problems(path)}


def test_a_good_recipe_has_no_problems(here):
    assert found(here) == {}


def test_the_model_is_not_imported(here):
    assert found(here) == {}
    assert "their_models" not in sys.modules


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("their_model:resnet56", "did you mean 'their_models'?"),
        ("their_models:resnet65", "'their_models' has no 'resnet65'; did you mean 'resnet56'?"),
        ("their_models.deep:resnet56", "no module 'deep' in 'their_models'"),
    ],
)
def test_an_import_path_that_leads_nowhere_gets_the_nearest_name(here, model, message):
    assert message in found(here, model=model)["model"]


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"depth": 56, "widht": 2}, "widht", "no such option; did you mean 'width'?"),
        ({}, "depth", "is required"),
        ({"depth": "deep"}, "depth", "should be a valid integer"),
        ({"depth": True}, "depth", "should be a valid integer"),
        ({"depth": 56, "width": []}, "width", "should be a valid number"),
    ],
)
def test_options_of_the_model_are_compared_with_its_signature(here, options, path, message):
    model = {"target": "their_models:resnet", "options": options}
    problems = found(here, model=model)
    assert list(problems) == [f"model.options.{path}"]
    assert message in problems[f"model.options.{path}"]


def test_annotations_that_cannot_be_evaluated_are_not_judged(here):
    options = {"depth": 56, "norm": 3, "kind": 3}
    assert found(here, model={"target": "their_models:resnet", "options": options}) == {}
    options = {"anything": 1}
    assert found(here, model={"target": "their_models:open_ended", "options": options}) == {}


@pytest.mark.parametrize("annotation", ["__import__('os').getcwd()", "[x for x in ()]", "2 ** 9"])
def test_annotations_are_never_run_as_code(annotation):
    from typing import Any

    assert check._type(annotation) is Any


PLUGINS = {
    "criterion": (
        {"prune": {"criterion": "tayler", "target": {"flops": 0.5}}},
        "prune.criterion",
        "no criterion is called 'tayler'; did you mean 'taylor'?",
    ),
    "quantizer": ({"quantize": {"weights": "minmx"}}, "quantize.weights", "'minmax'"),
    "loss": (
        {"distill": {"losses": ["kl", {"name": "feature-mes"}]}},
        "distill.losses[1]",
        "'feature-mse'",
    ),
    "backend": ({"export": ["torch", "onnxruntme"]}, "export[1]", "'onnxruntime'"),
    "option": (
        {"quantize": {"activations": {"name": "percentile", "options": {"percentil": 99}}}},
        "quantize.activations.options.percentil",
        "did you mean 'percentile'?",
    ),
    "value": (
        {"distill": {"losses": [{"name": "kl", "options": {"temperature": "hot"}}]}},
        "distill.losses[0].options.temperature",
        "should be a valid number",
    ),
    "no options": (
        {"prune": {"criterion": {"name": "l1", "options": {"x": 1}}, "target": {"flops": 0.5}}},
        "prune.criterion.options.x",
        "no such option",
    ),
    "no module": ({"export": ["gone"]}, "export[0]", "backend 'gone' of slimkit-theirs 1.0"),
    "no class": ({"export": ["renamed"]}, "export[0]", "has no 'Old'"),
}


@pytest.mark.parametrize(("changes", "path", "message"), PLUGINS.values(), ids=PLUGINS)
def test_a_plugin_that_cannot_be_used_as_written_is_a_problem(here, changes, path, message):
    problems = found(here, **changes)
    assert list(problems) == [path]
    assert message in problems[path]


DISTILL = {
    "teacher": ({"teacher": "their_models:resnet65"}, "distill.teacher", "mean 'resnet56'?"),
    "options": (
        {"teacher": {"name": "their_models:resnet", "options": {"dept": 3, "depth": 2}}},
        "distill.teacher.options.dept",
        "did you mean 'depth'?",
    ),
    "second": (
        {"teacher": ["dense", "their_modles:resnet56"]},
        "distill.teacher[1]",
        "did you mean 'their_models'?",
    ),
    "no file": ({"teacher": "./big"}, "distill.teacher", "no file or folder './big'"),
    "no artifact": ({"teacher": "./some"}, "distill.teacher", "holds no slimkit.json"),
    "no weights": (
        {"teacher": {"name": "dense", "weights": "better.pt"}},
        "distill.teacher.weights",
        "there is no file 'better.pt'",
    ),
    "cache": ({"cache": "their_data.py"}, "distill.cache", "is a file: name a folder"),
    "two places": (
        {"losses": ["kl", {"name": "fsp", "at": "layer1"}]},
        "distill.losses[1].at",
        "fsp compares 2 at once: write [[first, second]]",
    ),
    "one place": (
        {"losses": [{"name": "hint", "at": [["layer1", "layer2"]]}]},
        "distill.losses[0].at",
        "hint compares 1 at once: write one entry for each place",
    ),
    "peer": (
        {"teacher": "mutual", "losses": ["kl", {"name": "hint", "at": "layer1"}]},
        "distill.losses[1]",
        "hint learns parameters, which works one way only",
    ),
}


@pytest.mark.parametrize(("section", "path", "message"), DISTILL.values(), ids=DISTILL)
def test_distillation_that_cannot_work_as_written_is_a_problem(here, section, path, message):
    (here / "some").mkdir()
    problems = found(here, distill=section)
    assert list(problems) == [path]
    assert message in problems[path]


def test_distillation_that_can_work_is_no_problem(here):
    (here / "big").mkdir()
    (here / "big" / "slimkit.json").touch()
    section = {
        "teacher": ["./big", {"name": "their_models:resnet", "options": {"depth": 3}}, "ema"],
        "losses": ["dkd", {"name": "fsp", "at": [["a", "b"], ["c", "d"]]}, {"name": "crd"}],
        "cache": "somewhere",
    }
    assert found(here, distill=section) == {}


def test_a_missing_weights_file_is_a_problem(here):
    assert "there is no file 'dense.pt'" in found(here, weights="dense.pt")["weights"]
    (here / "dense.pt").touch()
    assert found(here, weights="dense.pt") == {}


def test_trainer_arguments_are_those_of_lightnings_trainer(here):
    trainer = {"max_epochs": 1, "seed": 3, "precison": 16, "num_nodes": "two", "barebones": True}
    problems = found(here, trainer=trainer)
    assert set(problems) == {"trainer.precison", "trainer.num_nodes"}
    assert "did you mean 'precision'?" in problems["trainer.precison"]


def test_a_recipe_that_changes_nothing_is_a_problem(here):
    assert "nothing to do" in found(here, prune=None)[""]


def test_a_gate_on_cost_needs_pruning(here):
    problems = found(here, prune=None, quantize={}, gates={"macs_ratio": 0.5, "params_ratio": 1})
    assert list(problems) == ["gates.macs_ratio"]


def test_a_window_in_steps_ends_within_the_training(here):
    prune = {"target": {"flops": 0.5}, "during": [0, 500]}
    problems = found(here, prune=prune, trainer={"max_steps": 400})
    assert problems == {"prune.during": "ends at step 500, but trainer.max_steps is 400"}
    assert found(here, prune=prune, trainer={"max_steps": 500}) == {}


def test_a_regularizer_needs_training(here):
    prune = {"target": {"flops": 0.5}, "regularizer": "growing"}
    problems = found(here, prune=prune, trainer={"max_epochs": 0})
    assert list(problems) == ["prune.regularizer"]


def test_zero_weights_reach_no_gate_of_costs(here):
    problems = found(here, prune={"granularity": "2:4"}, gates={"macs_ratio": 0.5})
    assert list(problems) == ["gates.macs_ratio"]
    assert "by zero weights" in problems["gates.macs_ratio"]


def test_what_the_schema_refuses_hides_no_other_problem(here):
    problems = found(
        here,
        model="their_models:resnet65",
        data="no_such_module:cifar",
        prune={"criterion": "tayler", "target": {"flops": 2}, "stepz": 1},
        quantize=3,
        distill=[],
        export="onnxruntme",
        gates={"agrement": 1},
        weights="dense.pt",
        trainer={"precison": 16},
    )
    assert set(problems) == {
        *("model", "data", "prune.criterion", "prune.target.flops", "prune.stepz", "quantize"),
        *("distill", "export", "gates.agrement", "weights", "trainer.precison"),
    }


@pytest.mark.parametrize("odd", [3, [], "text", None, {}, True])
@pytest.mark.parametrize(
    "key", ["model", "data", "prune", "quantize", "distill", "export", "weights", "trainer"]
)
def test_no_odd_value_breaks_the_check(here, key, odd):
    assert isinstance(found(here, **{key: odd}), dict)


def test_a_file_that_is_no_recipe_is_one_problem(here):
    (here / "bad.yaml").write_text("a: [")
    (problem,) = check.problems(here / "bad.yaml")
    assert "no valid YAML" in problem.message


def test_the_recipe_of_the_demo_is_good_and_checked_without_torch():
    code = (
        "import sys; from pathlib import Path; import slimkit.check as c;"
        "print(c.problems(Path(c.__file__).parent / 'demo' / 'recipe.yaml'),"
        "'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_rewrites_are_looked_up_and_their_options_read(here):
    rewrite = [
        "silu-to-hardswich",
        {"name": "gelu-to-tanh", "options": {"an": ["x"]}},
        "focus-to-conv",
    ]
    problems = found(here, rewrite=rewrite)
    assert problems["rewrite[0].name"].endswith("did you mean 'silu-to-hardswish'?")
    assert problems["rewrite[1].options.an"] == "no such option; there are: at"
    assert len(problems) == 2


def test_channels_are_not_padded_in_front_of_channel_pruning(here):
    assert "prune.round_to" in found(here, rewrite=["focus-to-conv", "pad-channels"])["rewrite[1]"]
    weights = {"granularity": "element", "target": {"ratio": 0.5}}
    assert not found(here, rewrite=["pad-channels"], prune=weights)


def test_rewrites_alone_are_something_to_do(here):
    assert not found(here, rewrite=["focus-to-conv"], prune=None)
