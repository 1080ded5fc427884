"""`conformance`: turns the promises of everything that a distribution registers into tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from slimkit.errors import PluginError, UnavailableError, did_you_mean
from slimkit.registry import Listed, discover
from slimkit.testing.backend import BACKEND
from slimkit.testing.criterion import CRITERION
from slimkit.testing.loss import LOSS
from slimkit.testing.package import PACKAGE
from slimkit.testing.promises import Promise, Promises, Subject
from slimkit.testing.quantizer import QUANTIZER

PROMISES: dict[str, Promises] = {
    "package": PACKAGE,
    "criterion": CRITERION,
    "quantizer": QUANTIZER,
    "loss": LOSS,
    "backend": BACKEND,
}
"""What each kind promises."""

Options = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Check:
    """One promise of one plugin; call it inside a test."""

    subject: Subject
    promise: Promise

    @property
    def id(self) -> str:
        """Such as ``criterion:my-taylor-scores_follow_a_channel_permutation``."""
        return f"{self.subject.label}-{self.promise.name}"

    def __call__(self) -> None:
        """Fail the test where the promise is broken; skip it where this machine cannot tell."""
        __tracebackhide__ = True
        try:
            broken = self.promise.broken(self.subject)
        except UnavailableError as error:
            pytest.skip(f"{self.subject}: {error}")
        if broken is not None:
            pytest.fail(str(broken), pytrace=False)


def conformance(
    distribution: str,
    *,
    options: Options | None = None,
    expected_failures: Mapping[str, str] | None = None,
    only: Sequence[str] = ("*",),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrize a test over the checks of everything that `distribution` registers.

    Args:
        distribution: the installed package, as ``pip list`` names it; ``slimkit`` for what ships
            in the box.
        options: by plugin, such as ``criterion:my-taylor``, the sets of options to check it with;
            left out, its defaults. ``[{}, {"power": 2.0}]`` checks the defaults and another.
        expected_failures: by check, such as ``criterion:my-taylor-half_precision``, the reason
            why it fails. Strict: a check that passes all the same is a failure.
        only: patterns of ids; a package with slow checks may share them out to several tests.

    Raises:
        PluginError: nothing of that name is installed, or an argument names no plugin or check.

    Example:
        >>> @conformance("slimkit", only=["criterion:l1-*"])
        ... def test_conformance(check):
        ...     check()
        >>> [mark.args[0] for mark in test_conformance.pytestmark]
        ['check']
    """
    options, expected = dict(options or {}), dict(expected_failures or {})
    checks = [*_checks(distribution, options)]
    known = {check.id for check in checks}
    # a name without options stands for every set of them
    plain = {f"{c.subject.kind}:{c.subject.name}-{c.promise.name}" for c in checks}
    for name in expected:
        if name not in known | plain:
            raise PluginError(
                f"expected_failures: {distribution} has no check {name!r}"
                f"{did_you_mean(name, sorted(known | plain))}"
            )
    params = []
    for check in checks:
        if any(fnmatchcase(check.id, pattern) for pattern in only):
            subject, promise = check.subject, check.promise
            reason = expected.get(check.id) or expected.get(
                f"{subject.kind}:{subject.name}-{promise.name}"
            )
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
            params.append(pytest.param(check, id=check.id, marks=marks))
    if not params:
        raise PluginError(f"only={list(only)} fits none of the {len(checks)} checks")

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        return pytest.mark.parametrize("check", params)(test)

    return decorate


def _checks(distribution: str, options: Options) -> Iterator[Check]:
    for subject in subjects_of(distribution, options):
        for promise in PROMISES[subject.kind]:
            yield Check(subject, promise)


def subjects_of(distribution: str, options: Options) -> list[Subject]:
    """The package and each of its plugins, once for each set of options.

    Raises:
        PluginError: nothing of that name is installed, or `options` names none of its plugins.
    """
    wanted = _normal(distribution)
    registry = discover()
    listed = [plugin for plugin in registry.plugins if _normal(plugin.package) == wanted]
    broken = [b for b in registry.broken if _normal(b.package) == wanted]
    if not listed and not broken:
        try:
            found = version(distribution)
        except PackageNotFoundError:
            raise PluginError(
                f"no distribution {distribution!r} is installed: pip install --editable ."
            ) from None
        raise PluginError(
            f"{distribution} {found} has no entry point in the group 'slimkit' that is in use: "
            "see [project.entry-points.slimkit] in its pyproject.toml and SLIMKIT_PLUGINS"
        )
    names = {f"{plugin.kind}:{plugin.name}" for plugin in listed}
    for name in options:
        if name not in names:
            raise PluginError(
                f"options: {distribution} has no plugin {name!r}{did_you_mean(name, sorted(names))}"
            )
    plugins = [
        _subject(plugin, given)
        for plugin in listed
        for given in options.get(f"{plugin.kind}:{plugin.name}", [{}])
    ]
    found = listed[0].version if listed else broken[0].version
    package = listed[0].package if listed else broken[0].package
    return [Subject("package", package, package, found, lambda: plugins), *plugins]


def _subject(plugin: Listed, options: Mapping[str, Any]) -> Subject:
    def make(*args: object) -> Any:
        return discover().create(plugin.kind, plugin.name, options, *args)

    return Subject(
        plugin.kind, plugin.name, plugin.package, plugin.version, make, plugin.target, options
    )


def _normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
