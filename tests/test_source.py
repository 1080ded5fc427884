"""What a module defines is read from its source, and nothing of it is imported."""

import inspect
import subprocess
import sys
from importlib import invalidate_caches

import pytest

from slimkit import source
from slimkit.errors import SlimkitError

MODELS = '''
from typing import TYPE_CHECKING
import torch.nn as nn
from slimkit.interfaces import Quantizer
from elsewhere import *_ARGS_*

raise SystemExit("imported")

LIMIT: float = 3.0
SCHEME = Scheme(
    bits=8,
)

if TYPE_CHECKING:
    import hidden
try:
    import fast as speed
except ImportError:
    speed = None

def resnet(depth, width: int = 16, *, norm: str = "batch", pool=None) -> nn.Module:
    """A residual network.

        indented
    """
    local = 1

@register
def wrapped(depth): ...

def anything(**options): ...

class Base(Quantizer):
    scheme = SCHEME
    def __init__(self, grid, *, bits: int): ...

class Child(Base):
    """Inherits."""

class Plain(Quantizer):
    pass

class Foreign(nn.Module):
    pass

@dataclass
class Record:
    x: int
'''.replace("*_ARGS_*", "thing")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "their_project"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "models.py").write_text(MODELS)
    (tmp_path / "their_namespace" / "inner").mkdir(parents=True)
    (tmp_path / "their_namespace" / "inner" / "data.py").write_text("def cifar(): ...")
    invalidate_caches()
    return tmp_path


def definition(name):
    return source.read("their_project.models").find(name)


def test_a_module_in_the_current_folder_is_read_without_importing_its_package(here):
    assert definition("resnet").doc.startswith("A residual network.")
    assert "their_project" not in sys.modules


def test_a_namespace_package_is_found(here):
    assert source.read("their_namespace.inner.data").names() == {"cifar"}


def test_an_installed_module_is_read_without_importing_its_package():
    code = (
        "import sys; from slimkit import source;"
        "print(len(source.read('pytorch_lightning.trainer.trainer').find('Trainer').options));"
        "print('torch' in sys.modules or 'pytorch_lightning' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, imported = done.stdout.split()
    assert imported == "False"
    from pytorch_lightning import Trainer

    assert int(count) == len(inspect.signature(Trainer).parameters)


def test_a_folder_without_python_does_not_hide_an_installed_package(here):
    (here / "pytorch_lightning").mkdir()
    invalidate_caches()
    assert source.read("pytorch_lightning.trainer.trainer") is not None


def test_a_compiled_module_exists_but_tells_nothing():
    assert source.read("math") is None


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("their_projct.models", "no module 'their_projct' .* did you mean 'their_project'?"),
        ("their_project.modles", "in 'their_project'; did you mean 'their_project.models'?"),
        ("their_project.models.deep", "no module 'deep' in 'their_project.models'"),
    ],
)
def test_a_missing_module_gets_the_nearest_name(here, module, message):
    with pytest.raises(SlimkitError, match=message):
        source.read(module)


def test_a_syntax_error_names_file_and_line(here):
    (here / "wrong.py").write_text("x = 1\ndef\n")
    invalidate_caches()
    with pytest.raises(SlimkitError, match=r"wrong\.py line 2"):
        source.read("wrong")


def test_names_are_what_an_import_would_find(here):
    expected = {
        *("TYPE_CHECKING", "nn", "torch", "Quantizer", "thing", "LIMIT", "SCHEME", "hidden"),
        *("speed", "resnet", "wrapped", "anything", "Base", "Child", "Plain", "Foreign", "Record"),
    }
    assert source.read("their_project.models").names() == expected - {"torch"}


@pytest.mark.parametrize(
    "text",
    [
        "from os import *",
        "def __getattr__(name): ...",
        "globals()['x'] = 1",
        "def register(name):\n    globals()[name] = 1",
        "exec('x = 1')",
        "import sys\nsetattr(sys.modules[__name__], 'x', 1)",
        "vars()['x'] = 1",
        "globals().update(x=1)",
        "here = globals()\nhere['x'] = 1",
    ],
)
def test_names_are_unknown_where_they_are_made_at_run_time(here, text):
    (here / "dynamic_names.py").write_text(text)
    invalidate_caches()
    assert source.read("dynamic_names").names() is None


def test_reading_names_at_run_time_hides_none(here):
    text = "def make(name): return globals()[name]()\nclass A: pass\nsetattr(A, 'x', 1)\nvars(A)"
    (here / "reading_names.py").write_text(text)
    invalidate_caches()
    assert source.read("reading_names").names() == {"make", "A"}


def test_parameters_carry_annotation_and_default_as_written(here):
    parameters = definition("resnet").parameters
    assert [(p.name, p.annotation, p.default, p.keyword_only) for p in parameters] == [
        ("depth", None, None, False),
        ("width", "int", "16", False),
        ("norm", "str", "'batch'", True),
        ("pool", None, "None", True),
    ]


def test_a_class_shows_its_constructor_without_self_also_from_a_base_in_the_same_file(here):
    for name in ("Base", "Child"):
        assert [p.name for p in definition(name).parameters] == ["grid", "bits"]
        assert [p.name for p in definition(name).options] == ["bits"]


@pytest.mark.parametrize("name", ["wrapped", "anything", "Foreign", "Record"])
def test_parameters_are_unknown_where_the_source_does_not_decide_them(here, name):
    assert definition(name).parameters is None
    assert definition(name).options is None


def test_a_class_on_top_of_an_interface_has_no_options_of_its_own(here):
    assert definition("Plain").options == ()


def test_a_class_attribute_is_shown_as_its_author_laid_it_out(here):
    assert definition("Child").attributes["scheme"] == "Scheme(\n    bits=8,\n)"


def test_what_is_no_class_or_function_of_this_file_has_no_definition(here):
    assert definition("LIMIT") is None
    assert definition("nn") is None


def test_a_scheme_that_is_another_class_s_is_shown_as_that_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "their_base.py").write_text("class Base:\n    scheme = Scheme(bits=4)\n")
    (tmp_path / "their_child.py").write_text(
        "from their_base import Base as Old\nfrom nowhere import Gone\n\n\n"
        "class Child:\n    scheme = Old.scheme\n    lost = Gone.scheme\n"
    )
    attributes = source.read("their_child").find("Child").attributes
    assert attributes == {"scheme": "Scheme(bits=4)", "lost": "Gone.scheme"}
