"""`slimkit new-plugin`: what it writes is a plugin package as a stranger would publish it."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from installing import installed, without_limit

from slimkit import registry
from slimkit.cli.new_plugin import new_plugin
from slimkit.errors import PluginError, SlimkitError
from slimkit.scaffold.naming import LONGEST, Names, names_for
from slimkit.scaffold.package import filled, write_package

KINDS = registry.kinds
NAMES = {kind: Names(kind, f"my-{kind}") for kind in KINDS}


def command(*args):
    return CliRunner().invoke(new_plugin, [str(arg) for arg in args])


def run(*args, cwd, **environment):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, args)],
        cwd=cwd,
        env={**without_limit(), **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with a package of each kind, and one that holds their dist-infos."""
    folder = tmp_path_factory.mktemp("packages")
    for names in NAMES.values():
        installed(write_package(names, folder), folder / "site")
    return folder


@pytest.fixture(scope="module")
def path(packages):
    """PYTHONPATH on which all four are installed."""
    sources = [packages / names.package / "src" for names in NAMES.values()]
    here = Path(__file__).parents[2]
    return os.pathsep.join(map(str, [packages / "site", *sources, here]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_is_clean_by_its_own_rules(packages, kind):
    folder = packages / NAMES[kind].package
    assert run("ruff", "check", "--no-cache", cwd=folder) == (0, "All checks passed!\n")
    code, said = run("ruff", "format", "--no-cache", "--diff", cwd=folder)
    assert code == 0, said


@pytest.mark.parametrize("kind", KINDS)
def test_long_names_stay_clean(tmp_path, kind):
    names = names_for(kind, "a-name-that-tells-all-of-it-ok"[:LONGEST])
    folder = write_package(names, tmp_path)
    assert run("ruff", "check", "--no-cache", cwd=folder)[0] == 0
    assert run("ruff", "format", "--no-cache", "--check", cwd=folder)[0] == 0


@pytest.mark.slow  # mypy reads all of torch
def test_packages_are_typed_strictly(packages):
    folders = [packages / n.package / part for n in NAMES.values() for part in ("src",)]
    cache = packages / "mypy"
    code, said = run("mypy", "--strict", "--cache-dir", cache, *folders, cwd=packages)
    assert (code, said.splitlines()[-1]) == (0, "Success: no issues found in 8 source files"), said


def test_packages_are_listed_and_nothing_is_broken(packages, path):
    code, said = run("slimkit", "list-plugins", "--strict", cwd=packages, PYTHONPATH=path)
    assert code == 0, said
    for names in NAMES.values():
        (line,) = (x for x in said.splitlines() if f" {names.plugin} " in x)
        assert line.split()[0] == names.kind
        assert line.split()[-2:] == [names.package, "0.1.0"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plugin_shows_its_contract_and_its_options(packages, path, kind):
    name = NAMES[kind].plugin
    code, said = run("slimkit", "list-plugins", name, cwd=packages, PYTHONPATH=path)
    assert code == 0
    assert "The contract: " in said
    options = {"criterion": "power", "quantizer": "share", "loss": "scale", "backend": "scheme"}
    assert f"\n{options[kind]} " in said


@pytest.mark.parametrize(
    "kinds",
    [["criterion"], pytest.param(["quantizer", "loss", "backend"], marks=pytest.mark.slow)],
    ids=["criterion", "others"],
)
def test_packages_pass_their_own_tests(packages, path, kinds):
    tests = [packages / NAMES[kind].package / "tests" for kind in kinds]
    # their pyproject.toml's strict settings, and no file of this repository's
    options = ["-q", "-rA", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull]
    code, said = run("pytest", *options, *tests, cwd=packages, PYTHONPATH=path)
    assert code == 0, said[-3000:]
    assert "failed" not in said.splitlines()[-1]
    for names in (NAMES[kind] for kind in kinds):
        assert f"[package:{names.package}-listed_without_importing_torch]" in said
        assert f"[{names.kind}:{names.plugin}-" in said


def test_a_pyproject_names_the_slimkit_that_wrote_it(packages):
    project = tomllib.loads((packages / "slimkit-my-loss" / "pyproject.toml").read_text())
    minor = ".".join(version("slimkit").split(".")[:2])
    assert f"slimkit>={minor}" in project["project"]["dependencies"]


def test_the_ci_file_is_yaml_and_runs_what_the_readme_names(packages):
    folder = packages / "slimkit-my-loss"
    jobs = yaml.safe_load((folder / ".github/workflows/ci.yml").read_text())["jobs"]
    steps = [step["run"] for step in jobs["test"]["steps"] if "run" in step]
    readme = (folder / "README.md").read_text()
    for step in steps[1:]:
        assert step.split()[0] in readme


@pytest.mark.parametrize(
    "name", ["My-Taylor", "my_taylor", "my--taylor", "-x", "x-", "", "3d", "a b", "naïve", "../x"]
)
def test_a_name_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(PluginError, match="is no name for a plugin: use lower-case"):
        names_for("criterion", name)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_for_a_line_of_code_is_refused():
    with pytest.raises(PluginError, match="at most 30 characters"):
        names_for("criterion", "a" * 31)


def test_a_name_that_is_taken_is_refused_with_its_owner():
    with pytest.raises(PluginError, match=r"criterion 'taylor' of slimkit .* already"):
        names_for("criterion", "taylor")


def test_the_same_name_of_another_kind_is_free():
    assert names_for("backend", "taylor").cls == "Taylor"


def test_a_name_of_a_known_package_is_refused(monkeypatch):
    monkeypatch.setattr("slimkit.scaffold.naming.PACKAGES", {"loss": {"far": "slimkit-faraway"}})
    with pytest.raises(PluginError, match="loss 'far' is that of slimkit-faraway"):
        names_for("loss", "far")


def test_a_distribution_that_is_installed_is_refused(install):
    install("slimkit-mine", {}, entry_points="")
    with pytest.raises(PluginError, match=r"slimkit-mine 1\.0 is installed already"):
        names_for("loss", "mine")


def test_a_module_that_is_in_the_way_is_refused(install):
    install("other", {"slimkit_mine": ""}, entry_points="")
    with pytest.raises(PluginError, match="slimkit_mine can be imported already"):
        names_for("loss", "mine")


@pytest.mark.parametrize(
    ("kind", "name", "cls"),
    [
        ("criterion", "layer", "LayerCriterion"),
        ("quantizer", "none", "NoneQuantizer"),
        ("loss", "huber", "Huber"),
        ("backend", "x1-y2", "X1Y2"),
    ],
)
def test_a_class_clashes_with_no_keyword_and_no_import(kind, name, cls):
    assert names_for(kind, name).cls == cls


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_what_exists_is_not_touched(tmp_path, there):
    target = tmp_path / "slimkit-mine"
    if there == "file":
        target.write_text("precious")
    elif there == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(SlimkitError, match="exists already"):
        write_package(Names("loss", "mine"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["slimkit-mine"]
    assert there != "file" or target.read_text() == "precious"


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    texts = {**filled(Names("loss", "mine")), "no/such\0path": ""}
    monkeypatch.setattr("slimkit.scaffold.package.filled", lambda names: texts)
    with pytest.raises(ValueError, match="null byte"):
        write_package(Names("loss", "mine"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_wrote_and_what_is_next(tmp_path):
    done = command("loss", "mine", "--output", tmp_path / "new")
    assert done.exit_code == 0
    folder = tmp_path / "new" / "slimkit-mine"
    assert f"wrote {folder}: the loss 'mine' is slimkit_mine.loss:Mine" in done.output
    assert f"cd {folder}" in done.output
    assert (folder / "src/slimkit_mine/loss.py").is_file()


def test_an_error_is_one_line_with_exit_code_2(tmp_path):
    code, said = run("slimkit", "new-plugin", "criterion", "taylor", cwd=tmp_path)
    assert code == 2
    assert said.startswith("Error: there is a criterion 'taylor' of slimkit ")
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_writing_and_its_help_import_no_torch(tmp_path):
    for args in (["--help"], ["criterion", "mine"]):
        code, said = run("slimkit", "new-plugin", *args, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
        assert code == 0
        imported = {line.rpartition("|")[2].strip() for line in said.splitlines()}
        assert "slimkit.cli.main" in imported
        assert not imported & {"torch", "pydantic", "rich"}
