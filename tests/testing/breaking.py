"""Plugins that break one promise each, and what the suite says of them."""

from __future__ import annotations

from typing import Any

from slimkit.testing.promises import Promises, Subject


def subject_of(kind: str, cls: type[Any], **options: Any) -> Subject:
    """A plugin that is not installed, as the suite sees those that are."""
    target = f"{cls.__module__}:{cls.__name__}"
    return Subject(
        kind, "mutant", "slimkit-mutant", "1.0", lambda *a: cls(*a, **options), target, options
    )


def broken_by(promises: Promises, subject: Subject) -> set[str]:
    """Names of the promises that it breaks."""
    return {promise.name for promise in promises if promise.broken(subject)}
