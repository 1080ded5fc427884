"""The command line: fast, quiet about its inside, and with exit codes that CI can trust."""

import functools
import json
import operator
import os
import re
import subprocess
import sys

import click
import pytest
from clock import allowed, fastest

from slimkit.cli import main as cli
from slimkit.errors import ExportError, GateError, StoppedError

RECIPE = "model: their_models:resnet\ndata: their_models:cifar\nquantize: {}\nexport: [torch]\n"


@pytest.fixture
def slimkit(tmp_path):
    """Runs the command line in a fresh process and folder."""

    def run(*args, **environment):
        clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "SLIMKIT_PLUGINS")}
        return subprocess.run(
            [sys.executable, "-m", "slimkit", *args],
            cwd=tmp_path,
            env={**clean, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    (tmp_path / "their_models.py").write_text("def resnet(): ...\ndef cifar(): ...\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return run


@pytest.fixture
def broken_package(tmp_path):
    """A folder for PYTHONPATH with a package whose import fails."""
    folder = tmp_path / "site"
    info = folder / "slimkit_theirs-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slimkit-theirs\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[slimkit]\ntheirs = their_plugin\n")
    (folder / "their_plugin.py").write_text("print('noise')\nraise SystemExit('no GPU')\n")
    return str(folder)


def seconds(run, *args):
    """What a command takes that must succeed."""

    def succeeding():
        done = run(*args)
        assert done.returncode == 0, done.stderr

    return fastest(succeeding)


@pytest.mark.parametrize("args", [["list-plugins"], ["list-plugins", "percentile"]])
def test_listing_plugins_takes_less_than_a_third_of_a_second(slimkit, args):
    assert seconds(slimkit, *args) < allowed(0.3)


@pytest.mark.parametrize("args", [["--help"], ["check", "recipe.yaml"]])
def test_help_and_check_take_less_than_a_second(slimkit, args):
    assert seconds(slimkit, *args) < allowed(1.0)


@pytest.mark.parametrize(
    ("args", "heavy"),
    [
        ("list-plugins", {"pydantic", "yaml"}),
        ("list-plugins onnxruntime", {"pydantic", "yaml"}),
        ("list-plugins --json", {"pydantic", "yaml", "rich"}),
        ("check recipe.yaml", {"rich"}),
        ("--help", {"pydantic", "yaml", "rich"}),
    ],
)
def test_a_command_imports_only_what_it_needs(slimkit, args, heavy):
    done = slimkit(*args.split(), PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "slimkit.cli.main" in imported
    assert not imported & {"torch", "pytorch_lightning", *heavy}


def test_the_list_names_kind_name_summary_package_and_version(slimkit):
    header, *rows = slimkit("list-plugins").stdout.splitlines()
    assert header.split() == ["kind", "name", "summary", "package", "version"]
    taylor = next(row for row in rows if " taylor " in row)
    assert taylor.split()[0] == "criterion"
    assert taylor.split()[-2] == "slimkit"


def test_piped_output_has_no_colours_and_one_line_for_each_plugin(slimkit):
    listed = json.loads(slimkit("list-plugins", "--json").stdout)["plugins"]
    done = slimkit("list-plugins", TERM="xterm-256color")
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == len(listed) + 1


def test_the_built_in_list_fits_a_narrow_terminal(slimkit):
    lines = slimkit("list-plugins", COLUMNS="80", SLIMKIT_PLUGINS="").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    wide = slimkit("list-plugins", SLIMKIT_PLUGINS="").stdout.splitlines()
    assert len(lines) == len(wide)


def test_only_one_kind_is_listed_when_asked(slimkit):
    listed = json.loads(slimkit("list-plugins", "--kind", "loss", "--json").stdout)["plugins"]
    assert {plugin["kind"] for plugin in listed} == {"loss"}


def test_a_name_shows_docstring_and_options_with_type_and_default(slimkit):
    shown = slimkit("list-plugins", "percentile").stdout
    assert "https://arxiv.org/abs/2004.09602" in shown
    row = next(line.split() for line in shown.splitlines() if line.startswith("percentile"))
    assert row == ["percentile", "float", "99.99"]


def test_a_backend_shows_its_scheme(slimkit):
    assert "\nscheme = Scheme(\n    activations=" in slimkit("list-plugins", "torch").stdout
    (shown,) = json.loads(slimkit("list-plugins", "torch", "--json").stdout)["plugins"]
    assert shown["scheme"].startswith("Scheme(")


def test_an_unknown_name_exits_with_2_and_the_nearest_one(slimkit):
    done = slimkit("list-plugins", "percentil")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: no plugin is called 'percentil'; did you mean")
    assert done.stdout == ""


def test_a_plugin_of_a_package_that_is_not_in_use_is_named_with_it(slimkit):
    done = slimkit("list-plugins", "pair-wise", SLIMKIT_PLUGINS="")
    assert done.returncode == 2
    assert re.match(
        r"Error: no plugin is called 'pair-wise'; slimkit-skd (\S+ )?has it", done.stderr
    )


def test_a_broken_package_is_one_line_and_fails_only_the_strict_list(slimkit, broken_package):
    done = slimkit("list-plugins", PYTHONPATH=broken_package)
    assert done.returncode == 0
    line = "broken: slimkit-theirs 1.5 (entry point 'theirs'): SystemExit: no GPU"
    assert done.stdout.splitlines()[-1] == line
    assert slimkit("list-plugins", "--strict", PYTHONPATH=broken_package).returncode == 1
    assert slimkit("list-plugins", "--strict").returncode == 0


def test_json_stays_json_when_a_package_prints_at_import(slimkit, broken_package):
    done = slimkit("list-plugins", "--json", PYTHONPATH=broken_package)
    assert json.loads(done.stdout)["broken"][0]["package"] == "slimkit-theirs"
    assert "noise" in done.stderr


def test_a_good_recipe_is_confirmed_in_one_line(slimkit):
    done = slimkit("check", "recipe.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "recipe.yaml: no problems found, ready for 'slimkit run recipe.yaml'\n"


def test_a_bad_recipe_exits_with_2_and_lists_every_problem(slimkit, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE + "gates: {x: 1}\nprune: {criterion: l3}\n")
    done = slimkit("check", "recipe.yaml")
    assert done.returncode == 2
    first, *problems = done.stderr.splitlines()
    assert first == "Error: recipe.yaml has 3 problems:"
    assert [p.split(":")[0].strip() for p in problems] == [
        "prune.target",
        "gates.x",
        "prune.criterion",
    ]


def test_check_prints_json_for_machines_with_the_same_exit_codes(slimkit, tmp_path):
    done = slimkit("check", "recipe.yaml", "--json")
    assert (done.returncode, json.loads(done.stdout)["problems"]) == (0, [])
    (tmp_path / "recipe.yaml").write_text(RECIPE + "gates: {x: 1}\n")
    done = slimkit("check", "recipe.yaml", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["problems"][0]["path"] == "gates.x"


def test_a_wrong_option_is_bad_input(slimkit):
    done = slimkit("list-plugins", "--knd", "loss")
    assert done.returncode == 2
    assert "--kind" in done.stderr


def test_a_reader_that_leaves_early_is_no_error(slimkit, tmp_path):
    code = f"{sys.executable} -m slimkit list-plugins --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""


def test_the_version_is_printed(slimkit):
    from importlib.metadata import version

    assert slimkit("--version").stdout == f"slimkit {version('slimkit')}\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ExportError("no runtime"), 2, "Error: no runtime\n"),
        (GateError("too slow"), 3, "Error: too slow\n"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (OSError("disk"), 2, "Error: disk\n"),
        (StoppedError("stopped by SIGTERM"), 143, "Error: stopped by SIGTERM\n"),
        (SystemExit(), 2, "Error: something ended the process before it was done\n"),
    ],
)
def test_an_error_has_its_exit_code(monkeypatch, capsys, error, code, said):
    def fail(*args):
        raise error

    monkeypatch.setattr("slimkit.registry.discover", fail)
    monkeypatch.setattr(sys, "argv", ["slimkit", "list-plugins"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""
    assert "Traceback" not in printed.err


def test_a_failure_of_our_own_is_a_bug_and_exits_with_1(monkeypatch, capsys):
    monkeypatch.setattr("slimkit.registry.discover", functools.partial(operator.truediv, 1, 0))
    monkeypatch.setattr(sys, "argv", ["slimkit", "list-plugins"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "This is a bug in slimkit" in printed


def test_a_failure_in_other_code_names_its_file_and_exits_with_2(monkeypatch, capsys):
    def fail():
        raise ZeroDivisionError("inside")

    monkeypatch.setattr("slimkit.registry.discover", fail)
    monkeypatch.setattr(sys, "argv", ["slimkit", "list-plugins"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert f"Error: {__file__} raised ZeroDivisionError: inside" in printed


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_is_laid_out_for_people(name):
    context = click.Context(cli.slimkit, info_name="slimkit")
    command = cli.slimkit.get_command(context, name)
    assert "\\b" not in command.get_help(click.Context(command, context, info_name=name))
