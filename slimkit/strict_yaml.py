"""Reads the mapping in a YAML file; a key that is given twice is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from slimkit.errors import Problem, RecipeError, did_you_mean


class _Loader(yaml.SafeLoader):
    """Takes 2:4 for text, as YAML 1.2 does, and not for minutes and seconds."""

    def construct_whole(self, node: yaml.ScalarNode) -> object:
        """A whole number, or what only looks like one with a colon in it."""
        return node.value if ":" in node.value else self.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)


def load(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file as it stands there; raises `RecipeError` with the line."""
    path = Path(path)
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        twice = list(_duplicates(node, "", set()))
        document = loader.construct_document(node) if node and not twice else None
    except FileNotFoundError as error:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("[!.]*.y*ml")))
        raise RecipeError(f"there is no recipe {path}{near}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise RecipeError(f"{path} is no valid YAML: line {line}: {error.problem}") from error
    except (ValueError, OverflowError, RecursionError) as error:  # such as the date 2020-99-99
        raise RecipeError(
            f"{path} holds a value that cannot be read: {error}; put text into quotes"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no valid YAML: {error}") from error
    if twice:
        raise RecipeError(f"{path} cannot be used:", twice)
    if not isinstance(document, dict):
        found = "is empty" if document is None else f"holds a {type(document).__name__}"
        raise RecipeError(f"{path} {found}; a recipe is a mapping with at least 'model' and 'data'")
    return document


def _duplicates(node: yaml.Node | None, path: str, seen: set[int]) -> Iterator[Problem]:
    if node is None or id(node) in seen:
        return
    seen.add(id(node))  # an alias may point back to its parent
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicates(item, path, seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            here = f"{path}.{name}" if path else name
            if name in lines:
                yield Problem(here, f"is given twice, in lines {lines[name]} and {line}")
            lines[name] = line
            yield from _duplicates(value, here, seen)
