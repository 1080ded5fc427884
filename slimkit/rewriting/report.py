"""What rewrites did to a model: stays with the model and goes into its artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimkit.plain import plain
from slimkit.rewriting.changes import Calls, Change, read, written


@dataclass(frozen=True)
class Rewritten:
    """What one rewrite did.

    Args:
        name: of the rewrite.
        exact: whether the outputs stay the same up to float rounding, which was verified.
        changes: what was changed, in order.
        left: a module or group that stays as it is, to the reason.
        options: what the rewrite was called with.
        sqnr_db: of an approximate one: signal to noise ratio of each output right after it against
            right before it, in decibels.
        samples: how many inputs that was measured on.
        metric: the validation metric right before and right after it, where it was measured.
    """

    name: str
    exact: bool
    changes: tuple[Change, ...] = field(repr=False)
    left: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    sqnr_db: tuple[float | None, ...] = ()
    samples: int = 0
    metric: tuple[float, float] | None = None

    @property
    def places(self) -> int:
        """How many modules, calls and groups of channels are changed."""
        return sum(c.count if isinstance(c, Calls) else 1 for c in self.changes)

    @property
    def cost(self) -> str:
        """What it costs in accuracy, in words."""
        if self.exact:
            return "exact, verified"
        known = [db for db in self.sqnr_db if db is not None]
        ratio = f"{min(known):.1f} dB" if known else "no difference"
        said = f"approximate, {ratio} SQNR on {self.samples} inputs"
        if self.metric is not None:
            said += ", metric {:.4f} to {:.4f}".format(*self.metric)
        return said

    def __str__(self) -> str:
        """One line, and one for each reason why something stayed."""
        count = "one place" if self.places == 1 else f"{self.places} places"
        lines = [f"{self.name:<24} {count}; {self.cost}"]
        for reason in dict.fromkeys(self.left.values()):
            names = [name for name, why in self.left.items() if why == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  left {', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "exact": self.exact,
            "options": plain(self.options),
            "places": self.places,
            "cost": self.cost,
            "left": dict(self.left),
            "sqnr_db": plain(self.sqnr_db),
            "samples": self.samples,
            "metric": plain(self.metric),
            "changes": [plain(written(change)) for change in self.changes],
        }


@dataclass(frozen=True)
class RewritingReport:
    """All rewrites of a model, in order.

    Args:
        done: one entry for each.
    """

    done: tuple[Rewritten, ...]

    @property
    def changes(self) -> list[Change]:
        """Everything that was changed, in order."""
        return [change for one in self.done for change in one.changes]

    def __str__(self) -> str:
        """One line a rewrite, and what each left with the reason."""
        return "\n".join(map(str, self.done))

    def as_list(self) -> list[dict[str, Any]]:
        """Plain data for JSON."""
        return [one.as_dict() for one in self.done]


def summarized(report: RewritingReport | None) -> list[dict[str, Any]]:
    """Plain data for people: without the changes themselves."""
    listed = report.as_list() if report else []
    return [{k: v for k, v in one.items() if k != "changes"} for one in listed]


def report_in(saved: Sequence[Mapping[str, Any]]) -> RewritingReport:
    """The report that `RewritingReport.as_list`, and JSON, made plain."""
    return RewritingReport(
        tuple(
            Rewritten(
                name=one["name"],
                exact=one["exact"],
                changes=tuple(read(change) for change in one["changes"]),
                left=one["left"],
                options=one["options"],
                sqnr_db=tuple(one["sqnr_db"]),
                samples=one["samples"],
                metric=None if one["metric"] is None else (one["metric"][0], one["metric"][1]),
            )
            for one in saved
        )
    )
