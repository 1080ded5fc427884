"""The whole extension surface: one record and four hooks.

A package registers itself under the entry-point group ``slimkit`` with a module (or object) that
implements any of the hooks below. Nothing of it is imported until a recipe names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pluggy

hookspec = pluggy.HookspecMarker("slimkit")
hookimpl = pluggy.HookimplMarker("slimkit")


@dataclass(frozen=True)
class Plugin:
    """What a hook yields: where to find one plugin class, without importing it.

    Args:
        name: kebab-case, unique within its kind; what a recipe writes.
        target: ``package.module:Class``, imported when a recipe uses the plugin.
        summary: one line for ``slimkit list-plugins``.
    """

    name: str
    target: str
    summary: str


@hookspec
def slimkit_criteria() -> Iterable[Plugin]:
    """Yield pruning criteria, subclasses of `slimkit.interfaces.Criterion`.

    A complete plugin:

        # slimkit_maxabs/__init__.py, registered in pyproject.toml with
        # [project.entry-points.slimkit]
        # maxabs = "slimkit_maxabs"
        from slimkit.hookspecs import Plugin, hookimpl

        @hookimpl
        def slimkit_criteria():
            yield Plugin("max-abs", "slimkit_maxabs.criterion:MaxAbs", "Largest absolute weight")

        # slimkit_maxabs/criterion.py
        from slimkit.interfaces import Criterion

        class MaxAbs(Criterion):
            '''Scores a weight by its absolute value to the fourth power.'''

            def score(self, layer):
                return layer.weight.float().abs() ** 4
    """
    raise NotImplementedError


@hookspec
def slimkit_quantizers() -> Iterable[Plugin]:
    """Yield quantizers, subclasses of `slimkit.interfaces.Quantizer`.

    A complete plugin:

        # slimkit_lastbatch/__init__.py, registered in pyproject.toml with
        # [project.entry-points.slimkit]
        # lastbatch = "slimkit_lastbatch"
        from slimkit.hookspecs import Plugin, hookimpl

        @hookimpl
        def slimkit_quantizers():
            yield Plugin("last-batch", "slimkit_lastbatch.quantizer:LastBatch", "The last batch")

        # slimkit_lastbatch/quantizer.py
        import torch
        from slimkit.interfaces import Quantizer

        class LastBatch(Quantizer):
            '''Covers exactly the values of the last batch it observed.'''

            follows_batches = True

            def __init__(self, grid):
                super().__init__(grid)
                self.register_buffer("lo", torch.zeros(grid.channels))
                self.register_buffer("hi", torch.zeros(grid.channels))

            def observe(self, x):
                if x.numel():
                    lo, hi = self.grid.ends(x.detach())
                    self.lo.copy_(lo)
                    self.hi.copy_(hi)

            def qparams(self):
                return self.grid.qparams(self.lo, self.hi)
    """
    raise NotImplementedError


@hookspec
def slimkit_losses() -> Iterable[Plugin]:
    """Yield distillation losses, subclasses of `slimkit.interfaces.DistillationLoss`.

    A loss that needs labels, compares several places at once or learns parameters says so by the
    attributes and methods of that class.

    A complete plugin:

        # slimkit_l1loss/__init__.py, registered in pyproject.toml with
        # [project.entry-points.slimkit]
        # l1loss = "slimkit_l1loss"
        from slimkit.hookspecs import Plugin, hookimpl

        @hookimpl
        def slimkit_losses():
            yield Plugin("feature-l1", "slimkit_l1loss.loss:FeatureL1", "Mean absolute difference")

        # slimkit_l1loss/loss.py
        from slimkit.interfaces import DistillationLoss

        class FeatureL1(DistillationLoss):
            '''Mean absolute difference of student and teacher, any equal shapes.'''

            def forward(self, student, teacher):
                return (student - teacher).abs().mean()
    """
    raise NotImplementedError


@hookspec
def slimkit_backends() -> Iterable[Plugin]:
    """Yield hardware backends, subclasses of `slimkit.interfaces.Backend`.

    A complete plugin:

        # slimkit_pt2/__init__.py, registered in pyproject.toml with
        # [project.entry-points.slimkit]
        # pt2 = "slimkit_pt2"
        from slimkit.hookspecs import Plugin, hookimpl

        @hookimpl
        def slimkit_backends():
            yield Plugin("pt2", "slimkit_pt2.backend:Pt2", "A torch.export file run by torch")

        # slimkit_pt2/backend.py
        import torch
        from slimkit.errors import ExportError
        from slimkit.interfaces import Backend, Grid, Scheme

        class Pt2(Backend):
            '''Saves the exported program and runs it with torch.'''

            scheme = Scheme(
                activations=Grid(bits=8, signed=False, symmetric=False),
                weights=Grid(bits=8, per_channel=True),
                operations=frozenset({"conv2d", "linear"}),
            )

            def compile(self, deployable, directory):
                torch.export.save(deployable.program, directory / "model.pt2")

            def load(self, directory, threads=1):
                path = directory / "model.pt2"
                try:
                    module = torch.export.load(path).module()
                except Exception as error:
                    raise ExportError(f"{path} is missing or damaged") from error

                def run(*inputs):
                    try:
                        return torch.utils._pytree.tree_leaves(module(*inputs))
                    except (ValueError, AssertionError) as error:
                        raise ExportError(f"{path} takes other inputs: {error}") from error

                return run
    """
    raise NotImplementedError
