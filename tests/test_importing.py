"""Backends that stand on another find it by its name."""

from __future__ import annotations

import pytest

from slimkit.builtin.backends.ncnn import Ncnn
from slimkit.errors import PluginError
from slimkit.importing import backend_named


def test_a_backend_is_found_by_the_name_that_recipes_use() -> None:
    assert type(backend_named("ncnn")) is Ncnn


def test_a_misspelt_backend_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(PluginError, match="did you mean 'ncnn'"):
        backend_named("ncn")


def test_options_are_checked() -> None:
    with pytest.raises(PluginError, match="colour"):
        backend_named("ncnn", {"colour": "red"})
