"""Recipes: defaults, round trips, and every problem at once with its path."""

import inspect
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slimkit.errors import RecipeError
from slimkit.pruning.prune import prune
from slimkit.recipe import Prune, Recipe

BASE = {"model": "project.models:resnet", "data": "project.data:cifar"}
FULL = {
    **BASE,
    "model": {"target": "project.models:resnet", "options": {"depth": 56}},
    "task": "classification",
    "metric": "val_accuracy",
    "weights": "dense.pt",
    "pretrain": {"max_epochs": 3, "optimizer": {"lr": "1e-3"}},
    "prune": {"criterion": "taylor", "target": {"flops": 0.5}, "protect": ["conv1"]},
    "distill": {"losses": ["kl", {"name": "feature-mse", "at": ["layer3", "layer4"]}]},
    "quantize": {"activations": {"name": "percentile", "options": {"percentile": 99.9}}},
    "export": ["onnxruntime", {"name": "ncnn"}],
    "gates": {"accuracy_drop": 0.01, "latency_ratio": 1.2},
    "trainer": {"max_epochs": 0, "precision": "bf16-mixed"},
}


def with_(path, value):
    """The smallest recipe with one key set, by its dotted path."""
    document = {**BASE, "prune": {"target": {"flops": 0.5}}}
    *parents, last = path.split(".")
    node = document
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    return document


def problems(document):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(document)
    return {problem.path: problem.message for problem in caught.value.problems}


def test_the_smallest_recipe_has_working_defaults():
    recipe = Recipe.parse(BASE)
    assert recipe.prune is None
    assert recipe.quantize is None
    assert [(loss.name, loss.at, loss.weight) for loss in recipe.distill.losses] == [
        ("kl", "output", 0.5)
    ]
    assert [backend.name for backend in recipe.export] == ["onnxruntime"]
    assert recipe.trainer.arguments == {"max_epochs": 10, "accelerator": "auto", "devices": "auto"}


def test_bare_names_and_mappings_mean_the_same():
    recipe = Recipe.parse(FULL)
    assert recipe.prune.criterion.name == "taylor"
    assert recipe.data.target == "project.data:cifar"
    assert (recipe.metric.name, recipe.metric.mode) == ("val_accuracy", "max")
    assert recipe.export[1].name == "ncnn"


def test_a_target_tells_its_kind_and_value():
    target = Recipe.parse(FULL).prune.target
    assert (target.kind, target.value) == ("flops", 0.5)


@pytest.mark.parametrize(("kind", "value"), [("size_mb", 12.5), ("importance", 0.9)])
def test_a_target_may_be_a_size_or_an_importance(kind, value):
    target = Recipe.parse({**BASE, "prune": {"target": {kind: value}}}).prune.target
    assert (target.kind, target.value) == (kind, value)


def test_ratios_may_stand_for_the_target_and_keep_their_order():
    prune = {"ratios": {"layer2": "0.5", "*": 0.25}, "max_ratio": [0.2, "6e-1"]}
    recipe = Recipe.parse(yaml.safe_load(Recipe.parse({**BASE, "prune": prune}).to_yaml()))
    assert recipe.prune.target is None
    assert list(recipe.prune.ratios.items()) == [("layer2", 0.5), ("*", 0.25)]
    assert recipe.prune.max_ratio == (0.2, 0.6)


def test_ratios_may_come_from_the_sensitivity_scan_with_a_target_of_cost():
    for kind in ("flops", "params"):
        recipe = Recipe.parse({**BASE, "prune": {"ratios": "sensitivity", "target": {kind: 0.5}}})
        assert recipe.prune.ratios == "sensitivity"
        assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe
    for target, named in (({"ratio": 0.5}, "ratio: 0.5"), (None, "none"), ({"size_mb": 2}, "size")):
        found = problems({**BASE, "prune": {"ratios": "sensitivity", "target": target}})
        assert list(found) == ["prune.target"]
        assert "flops or params with 'ratios: sensitivity'" in found["prune.target"]
        assert named in found["prune.target"]
    found = problems({**BASE, "prune": {"ratios": "sensible", "target": {"flops": 0.5}}})
    assert found == {"prune.ratios": "should be a mapping, or sensitivity, not 'sensible'"}


@pytest.mark.parametrize("ratios", [{}, {"ratios": {}}, {"target": None}])
def test_without_ratios_a_target_is_required(ratios):
    found = problems({**BASE, "prune": ratios})
    assert found == {"prune.target": "is required, unless 'ratios' says what is removed"}


def test_prune_takes_the_options_of_the_recipe_under_the_same_names():
    taken = set(inspect.signature(prune).parameters)
    only_trained = {"during", "steps", "schedule", "regularizer"}
    assert set(Prune.model_fields) - only_trained <= taken


def test_a_loss_is_between_the_student_and_the_teachers_place():
    assert [loss.sides for loss in Recipe.parse(FULL).distill.losses] == [
        (("output",), ("output",)),
        (("layer3",), ("layer4",)),
    ]


def test_further_trainer_arguments_are_kept():
    arguments = Recipe.parse(FULL).trainer.arguments
    assert arguments["precision"] == "bf16-mixed"
    assert "seed" not in arguments


DISTILL_REFUSED = [
    ("teacher[0].name", {"teacher": {"name": "other"}}),
    ("teacher[1].name", {"teacher": ["dense", "enma"]}),
    ("teacher[0].decay", {"teacher": {"name": "ema", "decay": 1}}),
    ("teacher[0].decy", {"teacher": {"name": "ema", "decy": 0.9}}),
    ("teacher[0].weight", {"teacher": {"name": "dense", "weight": -1}}),
    ("teacher[0]", {"teacher": 3}),
    ("teacher[0]", {"teacher": {"name": "dense", "options": {"depth": 3}}}),
    ("teacher[0]", {"teacher": {"name": "dense", "decay": 0.9}}),
    ("teacher[0]", {"teacher": {"name": "ema", "learns": True}}),
    ("teacher[0]", {"teacher": {"name": "./big", "weights": "w.pt"}}),
    ("teacher", {"teacher": {"name": "dense", "weight": 0}}),
    ("cache", {"teacher": ["ema", "mutual"], "cache": "kept"}),
    ("label_weight.value", {"label_weight": {}}),
    ("label_weight.value", {"label_weight": {"value": -1}}),
    ("label_weight.schedule", {"label_weight": {"value": 1, "schedule": "cubic"}}),
    ("label_weight.to", {"label_weight": {"value": 1, "to": 2}}),
    ("label_weight.to", {"label_weight": {"value": 1, "schedule": "warm-up", "to": 2}}),
    ("label_weight.to", {"label_weight": {"value": 1, "schedule": "decay", "to": 0}}),
    ("label_weight.to", {"label_weight": {"value": 0, "schedule": "decay"}}),
    ("label_weight.during", {"label_weight": {"value": 1, "during": [0.5, 0.1]}}),
    ("losses[0].weight.too", {"losses": [{"name": "kl", "weight": {"value": 1, "too": 2}}]}),
    ("losses[0].at", {"losses": [{"name": "kl", "at": "a["}]}),
    ("losses[0].at", {"losses": [{"name": "kl", "at": ["a", "b", "c"]}]}),
    ("losses[0].at", {"losses": [{"name": "kl", "at": [["a"], []]}]}),
]


@pytest.mark.parametrize(("path", "section"), DISTILL_REFUSED)
def test_distillation_out_of_bounds_is_one_problem_at_its_path(path, section):
    assert list(problems({**BASE, "distill": section})) == [f"distill.{path}"]


TAUGHT = {
    "teacher": ["./big", {"name": "a.b:c", "options": {"depth": 3}, "weight": 2}, "ema"],
    "weighting": "confidence",
    "losses": [
        {"name": "fsp", "at": [["a", "b[0]"]]},
        {"name": "fsp", "at": [["a", "b"], ["c", 'd["e"]']]},
        {"name": "kl", "weight": {"value": 1, "schedule": "cosine", "to": 0.1}},
    ],
    "label_weight": {"value": 1, "schedule": "warm-up", "during": [0, 0.2]},
    "cache": "kept",
    "precision": "bf16",
}


def test_teachers_schedules_and_places_survive_the_round_trip():
    recipe = Recipe.parse({**BASE, "distill": TAUGHT})
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe
    distill = recipe.distill
    assert [t.kind for t in distill.teacher] == ["file", "import", "ema"]
    assert [t.is_fixed for t in distill.teacher] == [True, True, False]
    assert [loss.sides for loss in distill.losses] == [
        (("a", "b[0]"), ("a", "b[0]")),
        (("a", "b"), ("c", 'd["e"]')),
        (("output",), ("output",)),
    ]


def test_one_teacher_needs_no_list():
    one = Recipe.parse({**BASE, "distill": {"teacher": "mutual"}}).distill.teacher
    assert (
        one == Recipe.parse({**BASE, "distill": {"teacher": [{"name": "mutual"}]}}).distill.teacher
    )


@pytest.mark.parametrize("off", [False, None])
def test_distillation_can_be_turned_off(off):
    assert Recipe.parse({**BASE, "distill": off}).distill is None


@pytest.mark.parametrize("document", [BASE, FULL, {**FULL, "distill": False}])
def test_yaml_round_trip_gives_the_same_recipe(document, tmp_path):
    recipe = Recipe.parse(document)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.read(path) == recipe


@given(st.floats(0, 1, exclude_min=True), st.floats(1e-9, 1e9), st.text(min_size=1, max_size=20))
def test_any_number_and_text_survives_the_round_trip(flops, lr, pattern):
    recipe = Recipe.parse(
        {
            **BASE,
            "prune": {"target": {"flops": flops}, "protect": [pattern]},
            "optimizer": {"lr": lr},
        }
    )
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe


def test_numbers_may_be_written_as_yaml_misreads_them():
    assert yaml.safe_load("1e-3") == "1e-3"  # YAML 1.1 wants a dot
    assert Recipe.parse(FULL).pretrain.optimizer.lr == 0.001


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Recipe.parse(BASE).version = 2


REFUSED = {
    "prune.target.flops": [0, 1.01, -0.5, math.nan, True, "half"],
    "prune.target": [{}, {"flops": 0.5, "ratio": 0.5}, {"flops": None}],
    "prune.target.size_mb": [0, -1, math.inf, "big"],
    "prune.target.importance": [0, 1, True],
    "prune.ratios": [[], None],
    "prune.ratios.layer1": [1, -0.1, True, "half"],
    "prune.ranking": ["globl", None],
    "prune.max_ratio": [1, -0.1, True, "half", [0.5], [0.1, 1], [0.1, 0.2, 0.3], {}],
    "prune.during": [[0.5, 0.4], 0.4, [500, 400]],
    "prune.regularizer": [3, []],
    "prune.regularizer.name": ["l1", None],
    "prune.steps": [0, 2.5, True],
    "prune.schedule": ["cosine"],
    "prune.granularity": ["4:8", None],
    "prune.block_size": [4, [1, 4], "1x4"],
    "prune.round_to": [0],
    "prune.min_channels": [0],
    "prune.batchnorm_batches": [-1],
    "prune.data_batches": [0],
    "prune.protect": ["conv1"],
    "prune.criterion": [3, ["l1"], None],
    "distill": [True],
    "distill.losses": [[], "kl"],
    "distill.teacher": ["other", "enma", []],
    "distill.weighting": ["confidence", "votes"],
    "distill.precision": ["fp8"],
    "distill.label_weight": [-1, True, "much", [], math.nan, math.inf],
    "quantize.train_from": [1.0, -0.1, 0.3],
    "quantize.calibration_batches": [0],
    "export": [[], ["ncnn", "ncnn"], "ncnn"],
    "gates.accuracy_drop": [-0.1],
    "gates.macs_ratio": [0, 1.5],
    "gates.params_ratio": [0, 1.5],
    "gates.latency_ratio": [0],
    "gates.size_ratio": [0],
    "gates.agreement": [1.5, -0.1],
    "optimizer.lr": [0],
    "optimizer.momentum": [1],
    "optimizer.warmup": [2],
    "pretrain.max_epochs": [0],
    "trainer.max_epochs": [-1, True, None],
    "trainer.devices": [True, ["a"], {}],
    "trainer": [3],
    "version": [2],
    "task": ["detection"],
    "model": [3],
}
CASES = [(path, value) for path, values in REFUSED.items() for value in values]


@pytest.mark.parametrize(("path", "value"), CASES, ids=[f"{p}={v}" for p, v in CASES])
def test_a_value_out_of_bounds_is_one_problem_at_its_path(path, value):
    assert list(problems(with_(path, value))) == [path]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([0, 1], (0.0, 1.0)),
        ([0.1, "0.5"], (0.1, 0.5)),
        ([200, 5000], (200, 5000)),
        ([0, "300"], (0.0, 300)),
        ([1000, 1], (1000, 1.0)),
    ],
)
def test_a_window_is_of_fractions_or_of_steps(given, meant):
    recipe = Recipe.parse(with_("prune.during", given))
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe
    during = recipe.prune.during
    assert during == meant
    assert [*map(type, during)] == [*map(type, meant)]


@pytest.mark.parametrize("value", [1.5, -1, "x", math.inf, math.nan, None, []])
def test_a_moment_is_a_fraction_or_a_whole_number(value):
    message = problems(with_("prune.during", [0, value]))["prune.during[1]"]
    assert message == (
        "should be a fraction of the training from 0 to 1, or a whole number of optimizer steps "
        f"above 1; not {value!r}"
    )


def test_a_regularizer_is_a_name_or_a_mapping():
    bare = Recipe.parse(with_("prune.regularizer", "bn-scale")).prune.regularizer
    assert (bare.name, bare.strength) == ("bn-scale", None)
    full = with_("prune.regularizer", {"name": "growing", "strength": 0.5})
    assert Recipe.parse(full).prune.regularizer.strength == 0.5


@pytest.mark.parametrize("strength", [0, -1, True, "much"])
def test_a_strength_is_over_zero(strength):
    document = with_("prune.regularizer", {"name": "growing", "strength": strength})
    assert list(problems(document)) == ["prune.regularizer.strength"]


def test_growing_needs_time():
    document = with_("prune.regularizer", "growing")
    document["prune"]["during"] = [0.3, 0.3]
    assert "growing needs time" in problems(document)["prune.regularizer"]


FINE = {
    "2:4 with a target": ({"granularity": "2:4", "target": {"ratio": 0.5}}, "target", "half of"),
    "element, flops": ({"granularity": "element", "target": {"flops": 0.5}}, "target", "ratio"),
    "block, nothing": ({"granularity": "block"}, "target", "needs ratio"),
    "channel, nothing": ({"granularity": "channel"}, "target", "is required"),
    "block size": ({"granularity": "2:4", "block_size": [1, 4]}, "block_size", "block, not 2:4"),
    **{
        name: ({"granularity": "2:4", name: value}, name, "about channels: leave it out")
        for name, value in {
            "ratios": {"a": 0.5},
            "ranking": "isomorphic",
            "engine": "export",
            "attention": "heads",
            "round_to": 8,
            "min_channels": 2,
            "regularizer": "bn-scale",
        }.items()
    },
}


@pytest.mark.parametrize(("prune", "path", "message"), FINE.values(), ids=FINE)
def test_what_does_not_go_with_a_granularity_is_refused(prune, path, message):
    found = problems({**BASE, "prune": prune})
    assert list(found) == [f"prune.{path}"]
    assert message in found[f"prune.{path}"]


@pytest.mark.parametrize(
    "prune",
    [
        {"granularity": "2:4"},
        {"granularity": "element", "target": {"ratio": 0.9}, "max_ratio": 0.95},
        {"granularity": "block", "target": {"ratio": 0.5}, "block_size": [2, 2]},
    ],
)
def test_a_recipe_of_a_granularity_survives_the_round_trip(prune):
    recipe = Recipe.parse({**BASE, "prune": prune})
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe


def test_an_item_of_a_list_has_its_index_in_the_path():
    assert list(problems(with_("prune.during", [0.1]))) == ["prune.during[1]"]
    assert list(problems(with_("prune.during", [False, 2.5]))) == [
        "prune.during[0]",
        "prune.during[1]",
    ]


@pytest.mark.parametrize("target", ["resnet", "project.models", "a:b:c", "a.b:", "./a.py:b"])
def test_an_import_path_has_a_module_and_a_name(target):
    assert "package.module:name" in problems({**BASE, "model": target})["model.target"]


UNKNOWN = {
    "modle": "model",
    "prune.critrion": "criterion",
    "prune.target.flop": "flops",
    "prune.target.importanc": "importance",
    "prune.ratio": "ratios",
    "prune.max_ratios": "max_ratio",
    "prune.regularizer.strenght": "strength",
    "optimizer.learn_rate": "lr, momentum",
    "gates.acuracy_drop": "accuracy_drop",
    "quantize.weight": "weights",
}


@pytest.mark.parametrize(("path", "near"), UNKNOWN.items())
def test_an_unknown_key_is_refused_with_the_nearest_one(path, near):
    message = problems(with_(path, 1))[path]
    assert message.startswith("no such key")
    assert near in message


def test_an_unknown_key_in_a_list_and_in_the_bare_form_is_found():
    document = {**BASE, "export": [{"nmae": "ncnn"}], "metric": {"name": "a", "modus": "max"}}
    found = problems(document)
    assert found["export[0].nmae"] == "no such key; did you mean 'name'?"
    assert found["metric.modus"] == "no such key; did you mean 'mode'?"


def test_all_problems_come_at_once():
    found = problems({"prune": {"target": {"flops": 2}}, "gates": {"x": 1}})
    assert set(found) == {"prune.target.flops", "gates.x"}


def test_rounding_cannot_begin_before_pruning_has_ended():
    document = with_("quantize.train_from", 0.3)
    assert "the end of prune.during (0.4)" in problems(document)["quantize.train_from"]
    assert Recipe.parse({**document, "prune": None}).quantize.train_from == 0.3


FILES = {
    "empty": ("", "is empty; a recipe is a mapping"),
    "only a comment": ("# nothing", "is empty"),
    "no mapping": ("- a\n- b\n", "holds a list"),
    "syntax": ("model: a\n  data: [b\n", "line 2"),
    "tab": ("model:\n\tdata: b", "line 2"),
    "two documents": ("a: 1\n---\nb: 2", "line 2"),
    "python object": ("model: !!python/name:os.system", "line 1"),
    "control character": ("model: \x07", "no valid YAML"),
    "date": ("weights: 2020-99-99", "a value that cannot be read: month must be in 1..12"),
    "depth": ("model: " + 3000 * "[", "a value that cannot be read"),
    "key twice": ("model: a\nprune:\n  steps: 1\n  steps: 2\n", "prune.steps: is given twice"),
    "key twice in a list": ("export:\n- name: a\n  name: b", "in lines 2 and 3"),
    "latin-1": (b"model: \xe9", "cannot be read"),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_recipe_is_refused_with_file_and_reason(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        Recipe.read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_an_alias_to_its_own_parent_ends(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("prune: &a\n  protect: *a\n")
    with pytest.raises(RecipeError, match=r"prune\.target: is required"):
        Recipe.read(path)


def test_anchors_and_merges_are_no_duplicates(tmp_path):
    path = tmp_path / "recipe.yaml"
    text = "model: a:b\ndata: a:b\nexport: [&n {name: ncnn}, {<<: *n, name: torch}]"
    path.write_text(text)
    assert [backend.name for backend in Recipe.read(path).export] == ["ncnn", "torch"]


def test_a_missing_file_gets_the_nearest_name(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"there is no recipe .*did you mean 'recipe.yaml'"):
        Recipe.read(tmp_path / "recpie.yaml")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.read(tmp_path)


def test_the_json_schema_describes_every_key_and_allows_bare_names():
    schema = Recipe.json_schema()
    nodes = [schema, *schema["$defs"].values()]
    for node in nodes:
        for name, key in node["properties"].items():
            assert key.get("description"), f"{node['title']}.{name}"
    criterion = schema["$defs"]["Prune"]["properties"]["criterion"]
    assert {"type": "string"} in criterion["anyOf"]
    assert schema["$defs"]["Gates"]["properties"]["agreement"]["anyOf"][0]["maximum"] == 1
    assert schema["additionalProperties"] is False


def test_two_of_four_needs_no_quotes(tmp_path):
    (tmp_path / "r.yaml").write_text("prune: {granularity: 2:4, criterion: l1}\n")
    assert Recipe.read(tmp_path / "r.yaml").prune.granularity == "2:4"
    (tmp_path / "r.yaml").write_text("prune: {granularity: 124, criterion: l1}\n")
    with pytest.raises(RecipeError, match="granularity: should be 'channel', .*, not 124"):
        Recipe.read(tmp_path / "r.yaml")


def test_a_seed_that_no_generator_takes_is_said():
    with pytest.raises(RecipeError, match="trainer.seed: should be less than or equal to"):
        Recipe.parse({"trainer": {"seed": 2**32}})
