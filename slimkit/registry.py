"""Finds plugins without importing them, isolates broken ones, and loads the one that is asked for.

The only file that knows pluggy. Built-ins and third parties come through the same hooks.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, distribution, distributions, version
from typing import Any

import pluggy

from slimkit import hookspecs
from slimkit.errors import PluginError, SlimkitError, Terminated, did_you_mean
from slimkit.hookspecs import Plugin

GROUP = "slimkit"
BUILTIN = "slimkit.builtin"

_HOOKS = {
    "criterion": "slimkit_criteria",
    "quantizer": "slimkit_quantizers",
    "loss": "slimkit_losses",
    "backend": "slimkit_backends",
}
_BASES = {
    "criterion": "Criterion",
    "quantizer": "Quantizer",
    "loss": "DistillationLoss",
    "backend": "Backend",
}
kinds = tuple(_HOOKS)

SLOW_S = 0.25  # a package that takes longer to be listed is named

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_name(text: str) -> bool:
    """Whether a plugin may be called that: kebab-case."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class Listed:
    """A plugin that can be named in a recipe, and the package that it came with."""

    kind: str
    name: str
    target: str
    summary: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} of {self.package} {self.version}"


@dataclass(frozen=True)
class Broken:
    """An entry point, or one record of it, that cannot be used, and why (one line)."""

    package: str
    version: str
    entry_point: str
    reason: str

    def __str__(self) -> str:
        return f"{self.package} {self.version} (entry point {self.entry_point!r}): {self.reason}"


@dataclass(frozen=True)
class Slow:
    """An entry point that works but takes long to be listed, at every command."""

    package: str
    version: str
    entry_point: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.package} {self.version} (entry point {self.entry_point!r}): takes "
            f"{self.seconds:.1f} s to be listed; it should import plugins only when they are used"
        )


@dataclass(frozen=True)
class Registry:
    """What is installed.

    Args:
        plugins: everything that works, built-ins first.
        broken: third parties that do not.
        left_out: entry-point names that SLIMKIT_PLUGINS excludes.
        slow: packages that make every command wait.
    """

    plugins: tuple[Listed, ...]
    broken: tuple[Broken, ...] = ()
    left_out: tuple[str, ...] = ()
    slow: tuple[Slow, ...] = ()

    def find(self, kind: str, name: str) -> Listed:
        """The plugin called `name`.

        Raises:
            PluginError: there is none; with the package that has it, or the nearest name.
        """
        known = {plugin.name: plugin for plugin in self.plugins if plugin.kind == kind}
        if name in known:
            return known[name]
        owner = self.owner(kind, name)
        hint = f"; {owner}" if owner else did_you_mean(name, known)
        raise PluginError("\n  ".join([f"no {kind} is called {name!r}{hint}", *self.absent()]))

    def name_of(self, kind: str, plugin: object) -> str:
        """What the class of an instance is called; ``package.module:Class`` if nobody lists it."""
        target = f"{type(plugin).__module__}:{type(plugin).__qualname__}"
        names = (p.name for p in self.plugins if (p.kind, p.target) == (kind, target))
        return next(names, target)

    def owner(self, kind: str, name: str) -> str | None:
        """Which package has a plugin that is not in use, and why; None where nobody knows."""
        from slimkit.known import PACKAGES, claims

        broken = {(b.package, b.entry_point) for b in self.broken}
        for (package, version_of), point in _entry_points([]):
            out, amiss = point.name in self.left_out, (package, point.name) in broken
            if (out or amiss) and claims(point, _HOOKS[kind], name):
                why = "is broken" if amiss else "SLIMKIT_PLUGINS leaves it out"
                return f"{package} {version_of} has it, but {why}"
        if name in PACKAGES[kind]:
            return f"{PACKAGES[kind][name]} has it: pip install {PACKAGES[kind][name]}"
        return None

    def absent(self) -> list[str]:
        """One line for each package that is installed but gives nothing, with the reason."""
        lines = [f"broken: {broken}" for broken in self.broken]
        if self.left_out:
            lines.append(f"left out by SLIMKIT_PLUGINS: {', '.join(self.left_out)}")
        return lines

    def load_class(self, kind: str, name: str) -> type[Any]:
        """Import the class of a plugin; errors name kind, plugin, package and version."""
        plugin = self.find(kind, name)
        module, _, attribute = plugin.target.partition(":")
        with blame(plugin, f"importing {plugin.target}"):
            found = getattr(import_module(module), attribute)
        # Compared by name: importing the interfaces is up to the plugin, they need torch.
        ancestors = [(c.__module__, c.__name__) for c in getattr(found, "__mro__", ())]
        if ("slimkit.interfaces", _BASES[kind]) not in ancestors:
            base = f"slimkit.interfaces.{_BASES[kind]}"
            raise PluginError(f"{plugin}: {plugin.target} is no subclass of {base}")
        return found

    def create(
        self, kind: str, name: str, options: Mapping[str, Any] | None = None, *args: object
    ) -> Any:
        """Build a plugin from its options, validated against its constructor's annotations.

        Args:
            kind: one of `kinds`.
            name: what the recipe calls it.
            options: keyword-only arguments of the constructor.
            *args: what slimkit itself passes first (a quantizer's grid).
        """
        from slimkit.validation import fit, option_types

        plugin, cls = self.find(kind, name), self.load_class(kind, name)
        with blame(plugin, "reading its options"):
            values, problems = fit(options or {}, *option_types(cls))
        if problems:
            raise PluginError("\n  ".join([f"options of {plugin}:", *map(str, problems)]))
        with blame(plugin, "constructing it"):
            return cls(*args, **values)


@contextlib.contextmanager
def blame(plugin: Listed, doing: str) -> Iterator[None]:
    """Raise what fails inside as a `PluginError` that names the plugin, from the original.

    Errors that slimkit raised on purpose pass unchanged.
    """
    try:
        yield
    except SlimkitError:
        raise
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"{plugin} failed while {doing}: {_told(error)}") from error


@contextlib.contextmanager
def blame_for(kind: str, plugin: object, doing: str) -> Iterator[None]:
    """`blame` for an instance; what no package registers, and a full disk, pass unchanged.

    Args:
        kind: of the plugin.
        plugin: whose method is called inside.
        doing: such as ``scoring layer1.0.conv1.weight``.
    """
    try:
        yield
    except (SlimkitError, OSError, MemoryError):
        raise
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        registry = discover()
        name = registry.name_of(kind, plugin)
        if ":" in name:
            raise
        owner = registry.find(kind, name)
        raise PluginError(f"{owner} failed while {doing}: {_told(error)}") from error


@cache
def discover() -> Registry:
    """Everything that is installed; runs the hooks of every package once a process."""
    here = version(GROUP)  # each call reads and parses the package's metadata
    own = [_listed(kind, r, GROUP, here) for kind, r in records_of(import_module(BUILTIN))]
    found, broken, left_out, slow = _third_parties()
    claims: dict[tuple[str, str], list[Listed]] = {}
    for plugin in [*own, *(plugin for plugin, _ in found)]:
        claims.setdefault((plugin.kind, plugin.name), []).append(plugin)
    working = list(own)
    for plugin, entry_point in found:
        owners = claims[plugin.kind, plugin.name]
        if len(owners) == 1:
            working.append(plugin)
        else:
            broken.append(
                Broken(
                    plugin.package, plugin.version, entry_point, _clash(owners, owners[0] in own)
                )
            )
    return Registry(tuple(working), tuple(broken), tuple(left_out), tuple(slow))


def _clash(owners: list[Listed], builtin_wins: bool) -> str:
    """Why a name cannot be used. Strangers never win: installing one must not change a recipe."""
    claimed = f"{owners[0].kind} {owners[0].name!r} is claimed by "
    claimed += " and ".join(f"{owner.package} {owner.version}" for owner in owners)
    if builtin_wins:
        return f"{claimed}; the built-in wins"
    return f"{claimed}; uninstall one, or leave one out with SLIMKIT_PLUGINS"


def _third_parties() -> tuple[list[tuple[Listed, str]], list[Broken], list[str], list[Slow]]:
    """Plugins with their entry point's name; what is broken, left out by SLIMKIT_PLUGINS, slow."""
    only = os.environ.get("SLIMKIT_PLUGINS")
    wanted = None if only is None else {name.strip() for name in only.split(",")}
    found: list[tuple[Listed, str]] = []
    broken: list[Broken] = []
    left_out: list[str] = []
    slow: list[Slow] = []
    for package, entry_point in _entry_points(broken):
        source = (*package, entry_point.name)
        if wanted is not None and entry_point.name not in wanted:
            left_out.append(entry_point.name)
            continue
        start = time.perf_counter()
        try:
            # What a package prints while it is imported must not end up in our --json output.
            with contextlib.redirect_stdout(sys.stderr):
                records = records_of(entry_point.load())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a package may even raise SystemExit at import
            broken.append(Broken(*source, _told(error)))
            continue
        taken = time.perf_counter() - start
        if taken > SLOW_S:
            slow.append(Slow(*source, taken))
        for kind, record in records:
            flaw = _flaw(kind, record)
            if flaw:
                broken.append(Broken(*source, flaw))
            else:
                found.append((_listed(kind, record, *source[:2]), entry_point.name))
    return found, broken, left_out, slow


def _entry_points(broken: list[Broken]) -> Iterator[tuple[tuple[str, str], EntryPoint]]:
    """A package's name and version with each entry point of our group, by the package's name.

    A package that cannot be read is `broken`.
    """
    names: set[str] = set()
    for package in distributions():
        with contextlib.suppress(UnicodeDecodeError):  # not ours: pip would refuse such a package
            if f"[{GROUP}]" in (package.read_text("entry_points.txt") or ""):
                names.add(re.sub(r"[-_.]+", "-", package.name or "").lower())
    for name in sorted(names - {""}):
        package = distribution(name)  # of two versions, the one that Python imports
        about = package.metadata  # parsed anew at each access
        known = (about["Name"], about["Version"])
        try:
            mine = [point for point in package.entry_points if point.group == GROUP]
        except Exception as error:
            broken.append(Broken(name, known[1], "", f"entry_points.txt: {_told(error)}"))
        else:
            yield from ((known, point) for point in sorted(mine, key=lambda point: point.name))


def records_of(source: object) -> list[tuple[str, Any]]:
    """What the hooks of one module yield, with the kind; raises whatever they raise.

    One manager for each source: a failed registration or a raising hook reaches nobody else.
    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(source)
    hooks = manager.get_hookcallers(source)
    if not hooks:
        raise PluginError(f"implements none of the hooks {', '.join(_HOOKS.values())}")
    for hook in hooks:
        if not hook.has_spec():
            near = did_you_mean(hook.name, _HOOKS.values())
            raise PluginError(f"no hook is called {hook.name!r}{near}")
    records = [
        (kind, record)
        for kind, hook in _HOOKS.items()
        for answer in getattr(manager.hook, hook)()
        for record in answer
    ]
    if not records:
        raise PluginError("its hooks yield no plugin")
    return records


def _flaw(kind: str, record: object) -> str | None:
    """What is wrong with one record of a stranger's hook."""
    if not isinstance(record, Plugin):
        return f"{_HOOKS[kind]} yielded a {type(record).__name__}, not a slimkit.hookspecs.Plugin"
    for field in ("name", "target", "summary"):
        if not isinstance(getattr(record, field), str):
            return f"{field} of a {kind} is {getattr(record, field)!r}, not a string"
    if not is_name(record.name):
        return f"{kind} name {record.name!r} is not in kebab-case, such as 'my-{kind}'"
    if not _TARGET.fullmatch(record.target):
        return f"target {record.target!r} of {kind} {record.name!r} is not 'package.module:Class'"
    if not record.summary.strip() or len(record.summary.splitlines()) > 1:
        return f"summary of {kind} {record.name!r} is not one line of text"
    return None


def _listed(kind: str, record: Plugin, package: str, version: str) -> Listed:
    return Listed(kind, record.name, record.target, record.summary, package, version)


def _told(error: BaseException) -> str:
    """Type and message of an error on one line."""
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = "(its message cannot be printed)"
    if isinstance(error, SlimkitError):
        return message
    return f"{type(error).__name__}: {message}"
