"""What ships in the box keeps every promise, and the decorator says what is wrong with its use."""

import pytest

from slimkit.errors import PluginError
from slimkit.testing import Check, conformance
from slimkit.testing.suite import PROMISES, subjects_of

OPTIONS = {
    "criterion:activation": [{}, {"statistic": "apoz"}],
    "quantizer:moving-average": [{}, {"momentum": 0.0}],
    "quantizer:percentile": [{}, {"percentile": 100.0}],
    "loss:kl": [{}, {"temperature": 1.0}],
}
EXPECTED = {
    "criterion:random-scores_follow_a_channel_permutation": "its scores are those of places",
}


@conformance(
    "slimkit",
    options=OPTIONS,
    expected_failures=EXPECTED,
    only=["package:*", "criterion:*", "quantizer:*", "loss:*", "backend:torch-*"],
)
def test_what_ships_in_the_box_keeps_its_promises(check):
    check()


@pytest.mark.slow
@conformance("slimkit", only=["backend:onnxruntime-*", "backend:ncnn-*"])
def test_the_runtimes_in_the_box_keep_their_promises(check):
    check()


@conformance(
    "slimkit",
    only=[
        f"backend:{backend}-{promise}"
        for backend in ("onnxruntime", "ncnn")
        for promise in ("samples_do_not_meet", "an_open_file_outlives_its_folder")
    ],
)
def test_the_runtimes_in_the_box_open_and_run(check):
    check()


GOOD = """
from slimkit.hookspecs import Plugin, hookimpl

@hookimpl
def slimkit_criteria():
    yield Plugin("my-taylor", "my_criterion:MyTaylor", "A criterion")
"""

CRITERION = '''
from slimkit.interfaces import Criterion

class MyTaylor(Criterion):
    """Absolute weights to a power."""

    def __init__(self, *, power: float = 1.0) -> None:
        self.power = power

    def score(self, layer):
        return layer.weight.float().abs() ** self.power
'''


def installed(install, hooks=GOOD, criterion=CRITERION):
    install("slimkit-mytaylor", {"mytaylor": hooks, "my_criterion": criterion})


def checks(test):
    """id -> (check, marks), as pytest sees them."""
    (mark,) = test.pytestmark
    return {param.id: (param.values[0], param.marks) for param in mark.args[1]}


def decorated(**arguments):
    def test(check):
        check()

    return checks(conformance("slimkit-mytaylor", **arguments)(test))


def failing(name, among=None):
    """The names of the package's promises that are broken, of all or some of them."""
    (package, *_) = subjects_of(name, {})
    asked = (p for p in PROMISES["package"] if among is None or p.name in among)
    return {p.name for p in asked if p.broken(package)}


def test_each_promise_is_a_test_of_its_own_with_a_readable_id(install):
    installed(install)
    ids = set(decorated())
    assert "criterion:my-taylor-scores_follow_a_channel_permutation" in ids
    assert "package:slimkit-mytaylor-listed_without_importing_torch" in ids
    assert len(ids) == len(PROMISES["package"]) + len(PROMISES["criterion"])


def test_a_distribution_may_be_written_as_it_is_imported(install):
    installed(install)
    assert {s.label for s in subjects_of("slimkit_mytaylor", {})} == {
        "package:slimkit-mytaylor",
        "criterion:my-taylor",
    }


def test_each_set_of_options_is_checked_with_those_options(install):
    installed(install)
    found = decorated(options={"criterion:my-taylor": [{}, {"power": 2.0}]})
    check, _ = found["criterion:my-taylor(power=2.0)-half_precision"]
    assert check.subject.make().power == 2.0
    assert "criterion:my-taylor-half_precision" in found


def test_an_expected_failure_is_strict_and_counts_for_every_set_of_options(install):
    installed(install)
    found = decorated(
        options={"criterion:my-taylor": [{}, {"power": 2.0}]},
        expected_failures={"criterion:my-taylor-half_precision": "slow on purpose"},
    )
    expected = {name: marks for name, (_, marks) in found.items() if marks}
    assert set(expected) == {
        "criterion:my-taylor-half_precision",
        "criterion:my-taylor(power=2.0)-half_precision",
    }
    ((mark,), *_) = expected.values()
    assert (mark.name, mark.kwargs) == ("xfail", {"strict": True, "reason": "slow on purpose"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"criterion:my-tailor": [{}]}}, "did you mean 'criterion:my-taylor'"),
        ({"expected_failures": {"criterion:my-taylor-half": "x"}}, "no check"),
        ({"only": ["loss:*"]}, "fits none of the"),
    ],
)
def test_an_argument_that_names_nothing_is_an_error(install, arguments, message):
    installed(install)
    with pytest.raises(PluginError, match=message):
        decorated(**arguments)


def test_a_distribution_that_is_not_installed_is_an_error_with_the_way_out():
    with pytest.raises(PluginError, match=r"no distribution 'slimkit-nobody' .*pip install"):
        conformance("slimkit-nobody")


def test_a_distribution_without_plugins_is_an_error():
    with pytest.raises(PluginError, match=r"pluggy .* has no entry point in the group 'slimkit'"):
        conformance("pluggy")


def test_a_good_package_keeps_its_promises(install):
    installed(install)
    assert failing("slimkit-mytaylor") == set()


LAMBDA = CRITERION.replace("self.power = power", "self.power, self.f = power, lambda x: x")
PACKAGES = {
    "everything_it_registers_works": (
        GOOD + '    yield Plugin("Bad Name", "my_criterion:MyTaylor", "Bad")\n',
        CRITERION,
    ),
    "listed_without_importing_torch": ("import torch\n" + GOOD, CRITERION),
    "listed_in_no_time": (
        GOOD.replace("    yield", "    import time; time.sleep(0.06)\n    yield"),
        CRITERION,
    ),
    "targets_are_importable": (
        GOOD,
        CRITERION.replace('    """Absolute weights to a power."""\n', ""),
    ),
    "options_are_valid": (GOOD, CRITERION.replace("power: float =", "power=")),
    "pickles_to_a_worker": (GOOD, LAMBDA),
}
MORE = {"listed_without_importing_torch": {"listed_in_no_time"}}  # torch takes a second


@pytest.mark.parametrize("promise", PACKAGES)
def test_a_wrong_package_breaks_the_promise_that_it_should(install, promise):
    installed(install, *PACKAGES[promise])
    assert failing("slimkit-mytaylor", [promise]) == {promise}


@pytest.mark.slow
@pytest.mark.parametrize("promise", PACKAGES)
def test_a_wrong_package_breaks_no_other_promise(install, promise):
    installed(install, *PACKAGES[promise])
    assert failing("slimkit-mytaylor") == {promise} | MORE.get(promise, set())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("self, power: float = 1.0", "is not a keyword-only argument"),
        ("self, *, power: float", "has no default"),
        ("self, *, power: float = 'much'", "the default of power: should be a valid number"),
        ("self, *, power: float = 1.0, **more: object", "is not a keyword-only argument"),
    ],
)
def test_options_that_a_recipe_cannot_give_are_named(install, options, said):
    installed(install, criterion=CRITERION.replace("self, *, power: float = 1.0", options))
    (package, *_) = subjects_of("slimkit-mytaylor", {})
    (promise,) = (p for p in PROMISES["package"] if p.name == "options_are_valid")
    assert said in promise.broken(package).came


def test_every_promise_of_a_package_has_a_mutant():
    assert {promise.name for promise in PROMISES["package"]} == set(PACKAGES)


@pytest.mark.parametrize("kind", PROMISES)
def test_every_promise_says_what_is_promised(kind):
    for promise in PROMISES[kind]:
        assert promise.says.endswith(".")
        assert len(promise.says) > 40


def test_a_broken_promise_fails_the_test_with_its_text(install):
    installed(install, criterion=CRITERION.replace(".abs()", ""))
    check, _ = decorated()["criterion:my-taylor-scores_are_finite_and_not_negative"]
    assert isinstance(check, Check)
    with pytest.raises(pytest.fail.Exception, match="breaks the promise") as caught:
        check()
    assert caught.value.pytrace is False


def test_a_crash_in_the_plugin_names_its_line(install):
    installed(install, criterion=CRITERION.replace("return layer", "return 1 / 0 * layer"))
    check, _ = decorated()["criterion:my-taylor-all_zero_weights"]
    with pytest.raises(pytest.fail.Exception, match="ZeroDivisionError") as told:
        check()
    assert "my_criterion.py" in str(told.value)
    assert "return 1 / 0 * layer" in str(told.value)
