"""Places: modules and parts of what they give, by path."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch

from slimkit.errors import SlimkitError
from slimkit.places import Place, parse

MODULES = ["backbone", "head", "head.cls", "layer3.0.conv1", "output", "output.dense"]
T = torch.ones(2, 3)
Pair = namedtuple("Pair", "boxes scores")


@dataclass(slots=True)
class Output:
    logits: torch.Tensor
    hidden: tuple


@pytest.mark.parametrize(
    ("text", "module", "steps"),
    [
        ("layer3.0.conv1", "layer3.0.conv1", []),
        ("head.cls[0]", "head.cls", [0]),
        ("head.cls[-1]['a.b']", "head.cls", [-1, "a.b"]),
        ('backbone["c3"]', "backbone", ["c3"]),
        ("output", "", []),
        ("output.logits", "", ["logits"]),
        ("output[1].boxes", "", [1, "boxes"]),
        ("output.dense", "output.dense", []),  # a module is meant where there is one
    ],
)
def test_a_place_is_a_module_and_the_way_into_its_output(text, module, steps):
    place = Place.of(text, MODULES)
    assert (place.module, [step.key for step in place.steps]) == (module, steps)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("output", T),
        ("output[1]", (0, T)),
        ("output[-1][0]", [0, [T]]),
        ("output.logits", {"logits": T}),
        ('output["logits"]', {"logits": T}),
        ("output.logits", Output(T, ())),
        ('output["hidden"][0]', Output(T, (T,))),
        ("output.scores", Pair(0, T)),
        ("output[1]", Pair(0, T)),
        ("output[3]", {3: T}),
    ],
)
def test_a_part_of_any_output_is_picked(text, value):
    assert Place.of(text, []).pick(value) is T


@pytest.mark.parametrize(
    ("text", "value", "message"),
    [
        ("output.logitz", {"logits": T}, "gives a dict of logits.*no .logitz; did you mean 'logi"),
        (
            "output.logitz",
            Output(T, ()),
            "gives an Output of logits, hidden.*did you mean 'logits'",
        ),
        ("output[2]", (T, T), r"gives a tuple of 2, in which there is no \[2\]"),
        ("output[0]", T, r"gives a tensor \(2, 3\), in which there is no \[0\]"),
        ("output.data", T, "gives a tensor"),
        ("output[0].x", ({"y": T},), r"'output\[0\]' gives a dict of y"),
        ("output.hidden[0]", Output(T, ()), r"'output.hidden' gives a tuple of 0"),
    ],
)
def test_a_part_that_is_not_there_is_said_with_what_is(text, value, message):
    with pytest.raises(SlimkitError, match=message):
        Place.of(text, []).pick(value)


def test_a_module_that_is_not_there_gets_the_nearest_name():
    with pytest.raises(SlimkitError, match="no module 'head.clss'; did you mean 'head.cls'"):
        Place.of("head.clss[0]", MODULES)


@pytest.mark.parametrize("text", ["", ".a", "a..b", "a.", "a[", "a[x]", "[0]", "a b", 'a["x]'])
def test_what_is_no_path_is_refused_at_its_place(text):
    with pytest.raises(ValueError, match="no path at|names no place"):
        parse(text)
