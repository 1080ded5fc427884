"""Packages that are broken in every way, really installed: each is one line, and harms nobody."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clock import allowed, fastest

from slimkit import registry

FOLDER = Path(__file__).parent / "broken_plugins"
REASONS = {
    "slimkit-claims": "loss 'of-two' is claimed by slimkit-claims 1.0 and slimkit-claims-too 1.0",
    "slimkit-claims-too": "loss 'of-two' is claimed by slimkit-claims 1.0 and slimkit-claims-too",
    "slimkit-exits": "SystemExit: no licence",
    "slimkit-hookless": "implements none of the hooks slimkit_criteria, slimkit_quantizers",
    "slimkit-hookraises": "LookupError: no table of criteria",
    "slimkit-missing": "ModuleNotFoundError: No module named 'broken_no_such_module'",
    "slimkit-names": "backend name 'My Backend' is not in kebab-case, such as 'my-backend'",
    "slimkit-raises": "RuntimeError: its device is not there",
    "slimkit-records": "slimkit_quantizers yielded a type, not a slimkit.hookspecs.Plugin",
}
GOOD = {"of-hangs", "of-prints", "of-names"}


@functools.cache
def listed(*args):
    """The command with all of them installed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "SLIMKIT_PLUGINS")}
    path = os.pathsep.join([str(FOLDER), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "slimkit", "list-plugins", *args],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_each_package_has_one_line_with_its_reason():
    lines = sorted(x for x in listed().stdout.splitlines() if x.startswith("broken: "))
    assert len(lines) == len(REASONS)
    for line, (package, reason) in zip(lines, sorted(REASONS.items()), strict=True):
        assert line.startswith(f"broken: {package} 1.0 (entry point '")
        assert reason in line


def test_every_folder_is_named_here():
    folders = {path.name.partition("-")[0] for path in FOLDER.glob("*.dist-info")}
    good = {"slimkit_hangs", "slimkit_prints"}
    assert folders - good == {package.replace("-", "_") for package in REASONS}


def test_built_ins_and_good_neighbours_are_listed_all_the_same():
    names = {p["name"] for p in json.loads(listed("--json").stdout)["plugins"]}
    assert names >= GOOD | {"taylor", "percentile", "kl", "onnxruntime"}


def test_only_the_strict_listing_fails():
    assert listed().returncode == 0
    assert listed("--strict").returncode == 1


def test_what_packages_print_is_no_part_of_the_listing():
    done = listed("--json")
    assert "hello" not in done.stdout
    assert "hello from the import" in done.stderr
    assert "hello from the hook" in done.stderr


def test_a_package_that_hangs_for_a_while_is_listed_and_named():
    (slow,) = [x for x in json.loads(listed("--json").stdout)["slow"] if x["seconds"] > 0.4]
    assert (slow["package"], slow["seconds"] > 0.5) == ("slimkit-hangs", True)
    assert "slow: slimkit-hangs 1.0 (entry point 'hangs'): takes 0." in listed().stdout


def test_being_slow_is_not_being_broken(install):
    install("slimkit-slow", {"slow": (FOLDER / "broken_hangs.py").read_text()})
    assert registry.discover().broken == ()
    assert [slow.package for slow in registry.discover().slow] == ["slimkit-slow"]


def twenty(install):
    for n in range(20):
        plugin = (FOLDER / "broken_prints.py").read_text().replace("print(", "str(")
        folder = install(f"slimkit-p{n}", {f"plugin_{n}": plugin.replace("of-prints", f"of-p{n}")})
    return folder


def test_twenty_packages_are_found_in_a_tenth_of_a_second_beyond_none(install):
    def seconds():
        registry.discover.cache_clear()
        start = time.perf_counter()
        found = registry.discover()
        return time.perf_counter() - start, len(found.plugins)

    alone, few = min(seconds() for _ in range(5))
    twenty(install)
    together, many = min(seconds() for _ in range(5))
    assert many == few + 20
    assert together - alone < 0.1


def test_listing_twenty_packages_takes_less_than_half_a_second(install):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(twenty(install)), *sys.path])}
    command = [sys.executable, "-m", "slimkit", "list-plugins"]

    def listing():
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert "of-p19" in done.stdout

    assert fastest(listing) < allowed(0.45)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_what_is_good_among_them_can_be_shown(name):
    done = listed(name, "--json")
    assert json.loads(done.stdout)["plugins"][0]["name"] == name
