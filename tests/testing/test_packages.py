"""Every package under plugins/ is complete; the template passes its own tests once installed."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from installing import installed, without_limit

from slimkit.known import PACKAGES
from slimkit.registry import kinds

ROOT = Path(__file__).parents[2]
PACKAGED = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
TEMPLATE = ROOT / "plugins" / "slimkit-example"


def project_of(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("folder", PACKAGED, ids=lambda folder: folder.name)
class TestEveryPackage:
    def test_has_a_version_a_readme_and_a_conformance_test(self, folder):
        project = project_of(folder)
        assert project["name"] == folder.name
        assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
        assert folder.name in (folder / project["readme"]).read_text()
        tests = "".join(path.read_text() for path in (folder / "tests").glob("test_*.py"))
        assert f'@conformance("{folder.name}"' in tests.replace("(\n    ", "(")

    def test_ships_its_types(self, folder):
        assert (folder / "src" / folder.name.replace("-", "_") / "py.typed").is_file()

    def test_is_an_extra_of_slimkit_and_known_to_it_unless_it_is_the_template(self, folder):
        extras = project_of(ROOT)["optional-dependencies"]
        known = {package for names in PACKAGES.values() for package in names.values()}
        extra = folder.name.removeprefix("slimkit-")
        if folder == TEMPLATE:
            assert extra not in extras
        else:
            assert extras[extra] == [folder.name]
            assert folder.name in known

    def test_is_in_the_test_environment_unless_it_is_the_template(self, folder):
        makefile = (ROOT / "Makefile").read_text()
        assert ("plugins/" + folder.name in makefile) == (folder != TEMPLATE)


def test_known_packages_are_in_this_repository():
    names = {package for kind in kinds for package in PACKAGES[kind].values()}
    assert names == {folder.name for folder in PACKAGED} - {TEMPLATE.name}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_template_passes_its_own_tests(tmp_path):
    installed(TEMPLATE, tmp_path / "site")
    path = [str(ROOT), str(ROOT / "tests"), str(tmp_path / "site"), str(TEMPLATE / "src")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
        + ["--rootdir", str(TEMPLATE), str(TEMPLATE / "tests")],
        cwd=tmp_path,
        env={**without_limit(), "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\b\d\d passed", done.stdout)
