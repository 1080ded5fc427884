"""Discovery: built-ins and strangers come in alike, and a broken stranger harms nobody."""

import ast
import functools
import inspect
import json
import re
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest
from surface import signature

from slimkit import hookspecs, interfaces, known, registry
from slimkit.errors import PluginError
from slimkit.grid import Grid
from slimkit.testing.suite import PROMISES, subjects_of

GOOD = """
from slimkit.hookspecs import Plugin, hookimpl

@hookimpl
def slimkit_criteria():
    yield Plugin("{name}", "{target}", "A stranger's criterion")
"""

CRITERION = """
from slimkit.interfaces import Criterion

class Stranger(Criterion):
    def __init__(self, *, power: float = 1.0, kind: str = "a", names: list[str] | None = None,
                 bias: bool = False):
        self.power, self.kind, self.names, self.bias = power, kind, names, bias

    def score(self, layer):
        return layer.weight.abs() ** self.power
"""


def good(name="stranger", target="stranger_criterion:Stranger"):
    return GOOD.format(name=name, target=target)


def names(kind="criterion"):
    return [p.name for p in registry.discover().plugins if p.kind == kind]


def only_broken():
    (broken,) = registry.discover().broken
    return broken


def test_all_four_kinds_of_built_ins_are_listed_with_slimkits_version():
    listed = registry.discover().plugins
    assert {p.kind for p in listed if p.package == "slimkit"} == set(registry.kinds)
    assert {p.version for p in listed if p.package == "slimkit"} == {version("slimkit")}


def test_a_strangers_plugin_is_listed_with_its_package_and_version(install):
    install("slimkit-stranger", {"stranger": good()}, package_version="2.3")
    found = registry.discover().find("criterion", "stranger")
    assert (found.package, found.version) == ("slimkit-stranger", "2.3")
    assert found.summary == "A stranger's criterion"


def test_discovery_imports_no_target(install):
    install("slimkit-stranger", {"stranger": good(), "stranger_criterion": "raise SystemExit"})
    assert "stranger" in names()
    assert "stranger_criterion" not in sys.modules


BROKEN = {
    "import error": ("import no_such_module", "ModuleNotFoundError: No module named"),
    "syntax error": ("def", "SyntaxError"),
    "exit at import": ("raise SystemExit(0)", "SystemExit: 0"),
    "own base exception": (
        "class Panic(BaseException): pass\nraise Panic('two\\nlines')",
        "Panic: two lines",
    ),
    "unprintable error": (
        "class Mute(Exception):\n    def __str__(self): raise ValueError\nraise Mute",
        "Mute: (its message cannot be printed)",
    ),
    "raising hook": (
        good().replace("yield", "raise RuntimeError('inside')\n    yield"),
        "RuntimeError: inside",
    ),
    "hook signature": (
        good().replace("slimkit_criteria()", "slimkit_criteria(model)"),
        "PluginValidationError",
    ),
    "misspelt hook": (
        good().replace("slimkit_criteria", "slimkit_criterions"),
        "did you mean 'slimkit_criteria'?",
    ),
    "no hook": ("", "implements none of the hooks"),
    "no record": (good().replace("yield", "return;"), "yield no plugin"),
    "one record instead of several": (good().replace("yield", "return"), "TypeError"),
    "no Plugin": (good().replace("yield Plugin", "yield "), "yielded a tuple"),
    "name": (good(name="Stranger_1"), "kebab-case"),
    "target": (good(target="stranger.Stranger"), "'package.module:Class'"),
    "summary": (good().replace("A stranger's criterion", ""), "not one line"),
    "field type": (good().replace('"stranger"', "7"), "name of a criterion is 7, not a string"),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_package_is_listed_with_its_reason_and_harms_nobody(install, source, reason):
    alone = names()
    install("slimkit-aaa", {"aaa": source}, package_version="0.9")
    install("slimkit-zzz", {"zzz": good("zzz")})
    assert names() == [*alone, "zzz"]
    broken = only_broken()
    assert (broken.package, broken.version, broken.entry_point) == ("slimkit-aaa", "0.9", "aaa")
    assert reason in broken.reason
    assert "\n" not in str(broken)


def test_a_missing_attribute_of_an_entry_point_is_a_reason(install):
    install("slimkit-aaa", {"aaa": good()}, "[slimkit]\na = aaa:missing\n")
    assert "missing" in only_broken().reason


def test_a_bad_record_does_not_take_its_neighbour_along(install):
    more = '\n    yield Plugin("Bad Name", "a:B", "Bad")\n'
    install("slimkit-aaa", {"aaa": good("fine") + more})
    assert "fine" in names()
    assert "Bad Name" in only_broken().reason


def test_a_built_in_wins_a_clash_and_both_owners_are_named(install):
    install("slimkit-aaa", {"aaa": good("taylor")})
    assert registry.discover().find("criterion", "taylor").package == "slimkit"
    reason = f"claimed by slimkit {version('slimkit')} and slimkit-aaa 1.0; the built-in wins"
    assert reason in only_broken().reason


def test_two_strangers_with_one_name_are_both_broken_so_that_no_recipe_changes_silently(install):
    install("slimkit-aaa", {"aaa": good("same") + more_criteria("other")})
    install("slimkit-zzz", {"zzz": good("same")})
    assert "same" not in names()
    assert "other" in names()
    assert [b.package for b in registry.discover().broken] == ["slimkit-aaa", "slimkit-zzz"]
    for broken in registry.discover().broken:
        assert "slimkit-aaa 1.0 and slimkit-zzz 1.0" in broken.reason


def more_criteria(name):
    return f'    yield Plugin("{name}", "a:B", "Another")\n'


def test_the_same_name_in_two_kinds_is_no_clash(install):
    text = good("taylor").replace("slimkit_criteria", "slimkit_losses")
    install("slimkit-aaa", {"aaa": text})
    assert registry.discover().broken == ()
    assert "taylor" in names("loss")


def test_what_a_package_prints_at_import_goes_to_stderr(install, capsys):
    install("slimkit-aaa", {"aaa": "print('hello')\n" + good()})
    assert "stranger" in names()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "hello" in printed.err


def test_of_two_versions_only_the_one_that_python_imports_counts(install, tmp_path, monkeypatch):
    install("slimkit-aaa", {"aaa": good("aaa")})
    stale = tmp_path / "stale" / "slimkit_aaa-0.1.dist-info"
    stale.mkdir(parents=True)
    (stale / "METADATA").write_text("Metadata-Version: 2.1\nName: slimkit_aaa\nVersion: 0.1\n")
    (stale / "entry_points.txt").write_text("[slimkit]\nold = aaa\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(stale.parent)])
    registry.discover.cache_clear()
    assert registry.discover().find("criterion", "aaa").version == "1.0"
    assert registry.discover().broken == ()


@pytest.mark.parametrize(("allowed", "seen"), [("b, c", ["bbb"]), ("", [])])
def test_the_environment_limits_strangers_but_not_built_ins(install, monkeypatch, allowed, seen):
    alone = [
        plugin.name
        for plugin in registry.discover().plugins
        if plugin.kind == "criterion" and plugin.package == "slimkit"
    ]
    monkeypatch.setenv("SLIMKIT_PLUGINS", allowed)
    install("slimkit-a", {"a": "raise SystemExit"})
    install("slimkit-b", {"b": good("bbb")})
    assert names() == alone + seen
    assert registry.discover().broken == ()
    assert "a" in registry.discover().left_out
    with pytest.raises(PluginError, match=r"left out by SLIMKIT_PLUGINS: a"):
        registry.discover().find("criterion", "aaa")


def test_an_unknown_name_gets_the_nearest_one_and_the_broken_packages(install):
    install("slimkit-aaa", {"aaa": "import no_such_module"})
    with pytest.raises(PluginError) as caught:
        registry.discover().find("criterion", "tayler")
    assert "no criterion is called 'tayler'; did you mean 'taylor'?" in str(caught.value)
    assert "broken: slimkit-aaa 1.0 (entry point 'aaa'): ModuleNotFoundError" in str(caught.value)


def test_a_target_that_cannot_be_imported_names_plugin_package_and_version(install):
    install("slimkit-aaa", {"aaa": good(), "stranger_criterion": "import no_such_module"})
    with pytest.raises(PluginError, match=r"criterion 'stranger' of slimkit-aaa 1\.0") as caught:
        registry.discover().load_class("criterion", "stranger")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("text", ["class Stranger: pass", "def Stranger(): pass"])
def test_a_target_that_is_no_subclass_of_its_interface_is_refused(install, text):
    install("slimkit-aaa", {"aaa": good(), "stranger_criterion": text})
    with pytest.raises(PluginError, match=r"no subclass of slimkit\.interfaces\.Criterion"):
        registry.discover().load_class("criterion", "stranger")


def test_options_are_coerced_to_the_annotations_of_the_constructor(install):
    install("slimkit-aaa", {"aaa": good(), "stranger_criterion": CRITERION})
    options = {"power": "1e-3", "names": ["a"], "bias": True}
    made = registry.discover().create("criterion", "stranger", options)
    assert (made.power, made.names, made.bias, made.kind) == (0.001, ["a"], True, "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"powr": 2.0}, "powr: no such option; did you mean 'power'?"),
        ({"power": "much"}, "power: should be a valid number"),
        ({"power": True}, "power: should be a valid number"),
        ({"kind": 3}, "kind: should be a valid string"),
    ],
)
def test_options_that_do_not_fit_are_named(install, options, message):
    install("slimkit-aaa", {"aaa": good(), "stranger_criterion": CRITERION})
    with pytest.raises(PluginError) as caught:
        registry.discover().create("criterion", "stranger", options)
    assert "options of criterion 'stranger' of slimkit-aaa 1.0:" in str(caught.value)
    assert message in str(caught.value)


def test_future_annotations_are_resolved_and_a_missing_option_is_named(install):
    text = "from __future__ import annotations\n" + CRITERION.replace(" = 1.0", "")
    install("slimkit-aaa", {"aaa": good(), "stranger_criterion": text})
    assert registry.discover().create("criterion", "stranger", {"power": "2"}).power == 2.0
    with pytest.raises(PluginError, match=r"power: is required"):
        registry.discover().create("criterion", "stranger")


def test_an_annotation_that_cannot_be_resolved_is_the_authors_error(install):
    text = CRITERION.replace("power: float", "power: 'Missing'")
    install("slimkit-aaa", {"aaa": good(), "stranger_criterion": text})
    with pytest.raises(PluginError, match=r"annotation 'Missing' of option 'power'"):
        registry.discover().create("criterion", "stranger", {"power": 2})


def test_a_raising_constructor_is_blamed_on_its_plugin(install):
    text = CRITERION.replace("self.power,", "1 / 0; self.power,")
    install("slimkit-aaa", {"aaa": good(), "stranger_criterion": text})
    with pytest.raises(PluginError, match=r"slimkit-aaa 1\.0 failed while constructing") as caught:
        registry.discover().create("criterion", "stranger")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_positional_arguments_come_before_options():
    grid = Grid(bits=4)
    made = registry.discover().create("quantizer", "percentile", {"percentile": "99"}, grid)
    assert (made.grid, made.percentile) == (grid, 99.0)


def test_importing_registry_and_discovering_imports_neither_torch_nor_pydantic():
    code = (
        "import sys, json; from slimkit.registry import discover; discover();"
        "print(json.dumps([m for m in ('torch', 'pydantic', 'click') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


HOOKS = [name for name in vars(hookspecs) if name.startswith("slimkit_")]


@pytest.mark.parametrize("hook", HOOKS)
def test_the_plugin_in_a_hooks_docstring_works_as_it_stands(install, hook):
    example = textwrap.dedent(
        inspect.getdoc(getattr(hookspecs, hook)).partition("A complete plugin:\n")[2]
    )
    files = re.split(r"^# (slimkit_\w+/\w+\.py).*\n", example, flags=re.MULTILINE)
    modules = {
        path.removesuffix(".py").replace("/", "."): text
        for path, text in zip(files[1::2], files[2::2], strict=True)
    }
    entry_point = re.search(r"^# (\w+ = \"\w+\")", example, flags=re.MULTILINE).group(1)
    install("slimkit-example", modules, f"[slimkit]\n{entry_point.replace(chr(34), '')}\n")
    assert registry.discover().broken == ()
    (listed,) = (p for p in registry.discover().plugins if p.package == "slimkit-example")
    assert listed.kind == dict(zip(HOOKS, registry.kinds, strict=True))[hook]
    grid = [Grid()] if listed.kind == "quantizer" else []
    made = registry.discover().create(listed.kind, listed.name, {}, *grid)
    assert f"{type(made).__module__}:{type(made).__name__}" == listed.target
    broken = [
        str(found)
        for subject in subjects_of("slimkit-example", {})
        for promise in PROMISES[subject.kind]
        if not re.search("network|process|worker", promise.name)  # they take a minute
        if (found := promise.broken(subject))
    ]
    assert broken == []


def test_a_plugin_of_a_known_package_is_named_with_it(monkeypatch):
    monkeypatch.setitem(known.PACKAGES, "backend", {"faraway": "slimkit-faraway"})
    with pytest.raises(PluginError) as caught:
        registry.discover().find("backend", "faraway")
    message = "no backend is called 'faraway'; slimkit-faraway has it: pip install slimkit-faraway"
    assert str(caught.value).splitlines()[0] == message


def test_a_plugin_of_a_broken_package_is_named_with_it(install):
    install("slimkit-aaa", {"aaa": "import no_such_module\n" + good("their-criterion")})
    with pytest.raises(PluginError) as caught:
        registry.discover().find("criterion", "their-criterion")
    first, second = str(caught.value).splitlines()
    assert first.endswith("'their-criterion'; slimkit-aaa 1.0 has it, but is broken")
    assert "No module named 'no_such_module'" in second


def test_a_plugin_of_a_package_that_is_left_out_is_named_with_it(install, monkeypatch):
    monkeypatch.setenv("SLIMKIT_PLUGINS", "")
    install("slimkit-aaa", {"aaa": good("theirs")})
    with pytest.raises(PluginError, match=r"slimkit-aaa 1\.0 has it, but SLIMKIT_PLUGINS leaves"):
        registry.discover().find("criterion", "theirs")
    assert "aaa" not in sys.modules


def test_a_plugin_of_another_kind_in_a_package_that_is_left_out_is_not_taken_for_it(
    install, monkeypatch
):
    monkeypatch.setenv("SLIMKIT_PLUGINS", "")
    install("slimkit-aaa", {"aaa": good("theirs")})
    with pytest.raises(PluginError) as caught:
        registry.discover().find("loss", "theirs")
    assert "has it" not in str(caught.value)


def test_every_known_package_of_this_repository_has_what_it_is_said_to_have():
    plugins = Path(__file__).parents[1] / "plugins"
    for kind, packages in known.PACKAGES.items():
        for name, package in packages.items():
            source = plugins / package / "src" / package.replace("-", "_") / "__init__.py"
            tree = ast.parse(source.read_text())
            assert name in known.names_in(tree.body, registry._HOOKS[kind])


HOOK_AND_METHOD = [
    *(f"slimkit.hookspecs.{hook}" for hook in HOOKS),
    *(
        f"slimkit.interfaces.{base}.{name}"
        for base in ("Criterion", "Quantizer", "DistillationLoss", "Backend")
        for name, value in vars(getattr(interfaces, base)).items()
        if inspect.isfunction(value) and not name.startswith("_")
    ),
]


@pytest.mark.parametrize("path", HOOK_AND_METHOD)
def test_every_hook_and_interface_method_is_documented_with_its_exact_signature(path):
    module, *names = path.removeprefix("slimkit.").split(".")
    found = functools.reduce(getattr, names, {"hookspecs": hookspecs}.get(module, interfaces))
    doc = inspect.getdoc(found) or ""
    assert doc.partition("\n\n")[0].endswith("."), doc
    assert inspect.signature(found).return_annotation is not inspect.Signature.empty
    line = signature(path.rpartition(".")[2], found)
    assert line in (Path(__file__).parents[1] / "docs" / "surface.md").read_text()
