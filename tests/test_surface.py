"""What is public changes only with a line in the CHANGELOG, and old hooks warn before they go."""

import json
import warnings

import pluggy
import pytest
import surface
from click.testing import CliRunner

from slimkit import hookspecs, registry
from slimkit.cli.schema import schema
from slimkit.recipe import Recipe

SAY = (
    "what plugins and users rely on has changed. If that is meant, say it in one sentence:\n"
    '    python docs/surface.py "what changes for them"\n'
    "writes it into CHANGELOG.md and the page anew; docs/stability.md says what may change when"
)


def test_the_public_surface_is_the_one_that_was_written_down():
    page, found = surface.PAGE.read_text(), surface.surface()
    changed = set(page.splitlines()) ^ set(found.splitlines())
    assert page == found, "\n".join([SAY, *sorted(changed)])


def test_the_schema_of_recipes_is_the_one_that_was_written_down():
    assert surface.SCHEMA.read_text() == surface.schema(), SAY


def test_the_surface_does_not_depend_on_the_order_of_sets():
    assert surface._written(frozenset("zebra")) == "frozenset(['a', 'b', 'e', 'r', 'z'])"


def test_a_change_is_written_down_only_with_a_sentence(tmp_path, monkeypatch):
    changelog = tmp_path / "CHANGELOG.md"
    old = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A.\n\n## [0.1.0]\n\n- B.\n"
    changelog.write_text(old)
    for name, file in (("CHANGELOG", changelog), ("PAGE", "page"), ("SCHEMA", "schema")):
        monkeypatch.setattr(surface, name, tmp_path / file)
    surface.main("`Backend.check` may be slow")
    text = changelog.read_text()
    unreleased = text.partition("## [0.1.0]")[0]
    assert "### Changed\n\n- `Backend.check` may be slow\n" in unreleased
    assert text.replace("### Changed\n\n- `Backend.check` may be slow\n\n", "") == old
    surface.main("And another")
    assert "### Changed\n\n- And another\n- `Backend.check`" in changelog.read_text()


def test_every_public_name_is_there():
    page = surface.PAGE.read_text()
    for hook in registry._HOOKS.values():
        assert f"{hook}() -> 'Iterable[Plugin]'" in page
    for base in registry._BASES.values():
        assert f"class {base}(" in page
    assert "conformance(distribution: 'str'" in page


def test_the_command_prints_the_schema_that_recipes_are_checked_by():
    printed = json.loads(CliRunner().invoke(schema).output)
    assert printed == Recipe.json_schema()
    assert printed["properties"]["version"] == {
        "const": 1,
        "default": 1,
        "description": "Of this format.",
        "title": "Version",
        "type": "integer",
    }
    assert printed["additionalProperties"] is False


def old_hooks(**options):
    """The hooks with one that is announced to go, as a module of hook specifications."""

    class Specs:
        slimkit_criteria = staticmethod(hookspecs.slimkit_criteria)

        @staticmethod
        @pluggy.HookspecMarker("slimkit")(**options)
        def slimkit_pruners(model):
            """Yield pruners."""

    return Specs


class Theirs:
    """A package that still implements it."""

    @staticmethod
    @hookspecs.hookimpl
    def slimkit_pruners(model):
        return [model]


GOES = "goes in 0.3: use slimkit_criteria"


@pytest.mark.parametrize(
    "options",
    [
        {"warn_on_impl": DeprecationWarning(GOES)},
        {"warn_on_impl_args": {"model": DeprecationWarning(GOES)}},
    ],
    ids=["hook", "argument"],
)
def test_a_hook_or_argument_that_will_go_warns_its_authors_and_still_works(options):
    manager = pluggy.PluginManager("slimkit")
    manager.add_hookspecs(old_hooks(**options))
    with pytest.warns(DeprecationWarning, match=GOES):
        manager.register(Theirs)
    assert manager.hook.slimkit_pruners(model=7) == [[7]]


def test_who_does_not_use_what_will_go_is_not_warned():
    manager = pluggy.PluginManager("slimkit")
    manager.add_hookspecs(old_hooks(warn_on_impl=DeprecationWarning("goes")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.register(hookspecs)
