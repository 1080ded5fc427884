"""An error inside a plugin names kind, plugin, package, version and place, and keeps its cause."""

import pytest
import torch
from torch import nn

import slimkit
from slimkit.errors import PluginError
from slimkit.interfaces import Criterion

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))

HOOKS = """
from slimkit.hookspecs import Plugin, hookimpl

@hookimpl
def slimkit_criteria():
    yield Plugin("raising", "raising_plugins:RaisingCriterion", "Fails")

@hookimpl
def slimkit_quantizers():
    yield Plugin("raising", "raising_plugins:RaisingQuantizer", "Fails")

@hookimpl
def slimkit_backends():
    yield Plugin("raising", "raising_plugins:RaisingBackend", "Fails")
"""

PLUGINS = """
import torch
from slimkit.builtin.backends.reference import Reference
from slimkit.builtin.quantizers.minmax import MinMax
from slimkit.interfaces import Criterion

class RaisingCriterion(Criterion):
    def score(self, layer):
        raise KeyError("no table")

class RaisingQuantizer(MinMax):
    def __init__(self, grid, *, when: str = "observe"):
        super().__init__(grid)
        self.when = when
        if when == "construct":
            raise KeyError("no table")

    def observe(self, x):
        super().observe(x)
        if self.when == "observe":
            raise KeyError("no table")

    def forward(self, x):
        raise KeyError("no table")

class RaisingBackend(Reference):
    def __init__(self, *, error: str = "KeyError"):
        self.error = error

    def compile(self, deployable, directory):
        raise {"KeyError": KeyError, "OSError": OSError}[self.error]("no table")
"""


@pytest.fixture(autouse=True)
def _installed(install):
    install("slimkit-raising", {"raising": HOOKS, "raising_plugins": PLUGINS}, None, "2.5")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def told(caught, kind, doing):
    assert str(caught.value) == (
        f"{kind} 'raising' of slimkit-raising 2.5 failed while {doing}: KeyError: 'no table'"
    )
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__cause__.__traceback__ is not None


def test_a_criterion_that_fails_is_named_with_its_layer():
    with pytest.raises(PluginError) as caught:
        slimkit.prune(net(), X, "raising", target={"ratio": 0.5})
    told(caught, "criterion", "scoring 0.weight")


def test_a_quantizer_that_fails_in_calibration_is_named_with_its_place():
    with pytest.raises(PluginError) as caught:
        slimkit.quantize(net(), [X], "torch", activations="raising")
    told(caught, "quantizer", "observing input0")


@pytest.mark.parametrize(
    ("role", "place"), [("weights", "0/weight:weight"), ("activations", "input0")]
)
def test_a_quantizer_that_fails_in_rounding_is_named_with_its_place(role, place):
    choice = {"name": "raising", "options": {"when": "round"}}
    small = slimkit.quantize(net(), [X], "torch", **{role: choice})
    with pytest.raises(PluginError, match=rf"slimkit-raising 2\.5 failed while rounding {place}"):
        small(X)


def test_a_backend_that_fails_is_named_with_the_model(tmp_path):
    with pytest.raises(PluginError) as caught:
        slimkit.export(net(), X, "raising", directory=tmp_path / "net")
    told(caught, "backend", "compiling Sequential")


def test_what_the_system_says_passes_as_it_is(tmp_path):
    from slimkit.registry import discover

    backend = discover().create("backend", "raising", {"error": "OSError"})
    with pytest.raises(OSError, match="no table"):
        slimkit.export(net(), X, backend, directory=tmp_path / "net")


def test_an_instance_that_no_package_registers_raises_its_own_error():
    class Own(Criterion):
        def score(self, layer):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        slimkit.prune(net(), X, Own(), target={"ratio": 0.5})
