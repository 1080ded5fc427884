"""Chooses the engine that finds coupled channels."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from slimkit.errors import PruningError
from slimkit.pruning.coupling import Attention, Coupling

Engine = Literal["slimkit", "export", "torch-pruning"]


def find_groups(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    engine: Engine = "slimkit",
    attention: Attention = "dimensions",
) -> Coupling:
    """List the groups of coupled channels of `model`, which is not changed.

    Groups are disjoint and in the order in which the model lists its layers. What cannot be removed
    is left out with its reason.

    Args:
        model: the model.
        example_inputs: the forward's arguments.
        engine: ``slimkit``, slimkit's own analysis of the operations of one forward; ``export``,
            the same analysis of the graph of torch.export, which is slower and follows no values;
            or ``torch-pruning``, Torch-Pruning's dependency graph, which traces autograd.

        attention: whether attention loses ``dimensions``, each in all heads, or whole ``heads``;
            Torch-Pruning's engine knows neither.

    Raises:
        PruningError: the engine is unknown or cannot trace the model.
    """
    if attention not in ("dimensions", "heads"):
        raise PruningError(f"attention must be 'dimensions' or 'heads', not {attention!r}")
    if engine == "slimkit":
        from slimkit.pruning.analysis import groups_by_analysis

        return groups_by_analysis(model, example_inputs, attention=attention)
    if engine == "export":
        from slimkit.pruning.analysis import groups_by_analysis
        from slimkit.pruning.exporting import exported

        return groups_by_analysis(model, example_inputs, [exported], attention=attention)
    if engine == "torch-pruning":
        from slimkit.pruning.dependency_graph import groups_by_dependency_graph

        return groups_by_dependency_graph(model, example_inputs)
    raise PruningError(f"engine must be 'slimkit', 'export' or 'torch-pruning', not {engine!r}")
