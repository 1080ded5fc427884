"""What the commands that run a recipe do first."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimkit.recipe import Recipe


def located(given: str | Path) -> Path:
    """The file of a recipe: for ``demo`` the one that ships with slimkit."""
    return (
        Path(__file__).parent.parent / "demo" / "recipe.yaml"
        if str(given) == "demo"
        else Path(given)
    )


def usable(given: Path) -> tuple[Recipe, str]:
    """The recipe in a file, or the one that ships with slimkit for ``demo``, and its name.

    Raises:
        RecipeError: it has problems; all of them.
    """
    from slimkit.check import problems
    from slimkit.errors import RecipeError
    from slimkit.recipe import Recipe

    path = located(given)
    found = problems(path)
    if found:
        raise RecipeError(f"{path} cannot be used:", found)
    return Recipe.read(path), "demo" if str(given) == "demo" else path.stem


def sayer(quiet: bool) -> Callable[[str], None]:
    """Says a line on standard error, or nothing; of several processes, the first one speaks."""
    from slimkit.progress import line

    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    quiet = quiet or next((rank != "0" for rank in ranks if rank is not None), False)

    def say(text: str) -> None:
        if not quiet:
            line(f"slimkit: {text}")

    return say
