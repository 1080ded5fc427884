"""The names of a new package, all of which follow from the plugin's."""

from __future__ import annotations

import keyword
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from slimkit.errors import PluginError
from slimkit.known import PACKAGES
from slimkit.registry import discover, is_name

_IMPORTED = {
    "Any", "Backend", "Criterion", "Deployable", "DistillationLoss", "Grid", "Iterator", "Layer",
    "Path", "Plugin", "Quantizer", "Runner", "Scheme", "Tensor",
}  # fmt: skip
"""What a template imports under its own name."""
LONGEST = 30  # characters; module and class follow from it and share a line of 100


@dataclass(frozen=True)
class Names:
    """What a new package and its parts are called.

    Args:
        kind: of the plugin.
        plugin: what a recipe writes, such as ``my-taylor``.
    """

    kind: str
    plugin: str

    @property
    def package(self) -> str:
        """The distribution: ``slimkit-my-taylor``."""
        return f"slimkit-{self.plugin}"

    @property
    def module(self) -> str:
        """What is imported: ``slimkit_my_taylor``."""
        return self.package.replace("-", "_")

    @property
    def cls(self) -> str:
        """The class: ``MyTaylor``."""
        name = "".join(part.capitalize() for part in self.plugin.split("-"))
        clashes = keyword.iskeyword(name) or name in _IMPORTED
        return name + self.kind.capitalize() if clashes else name


def names_for(kind: str, plugin: str) -> Names:
    """Names for a new plugin.

    Raises:
        PluginError: the name is no valid one, or an installed or known package has it.
    """
    if len(plugin) > LONGEST:
        raise PluginError(f"{plugin!r} is too long: use at most {LONGEST} characters")
    if not is_name(plugin) or plugin[0].isdigit():
        raise PluginError(
            f"{plugin!r} is no name for a plugin: use lower-case letters, digits and single "
            "hyphens, beginning with a letter, such as 'my-taylor'"
        )
    names = Names(kind, plugin)
    for installed in discover().plugins:
        if (installed.kind, installed.name) == (kind, plugin):
            raise PluginError(f"there is a {installed} already: choose another name")
    owner = PACKAGES[kind].get(plugin)
    if owner is not None:
        raise PluginError(f"the {kind} {plugin!r} is that of {owner}: choose another name")
    try:
        found = distribution(names.package)
    except PackageNotFoundError:
        pass
    else:
        raise PluginError(
            f"a package {names.package} {found.version} is installed already: choose another name"
        )
    if find_spec(names.module) is not None:
        raise PluginError(f"a module {names.module} can be imported already: choose another name")
    return names
