"""Where the pretrained weights and data sets lie."""

from __future__ import annotations

import os
from pathlib import Path

from slimkit.errors import SlimkitError


def data_folder(root: str | None = None, part: str = "weights") -> Path:
    """Return the data folder, `root` or what the variable SLIMKIT_DATA names.

    Args:
        root: the folder; left out: the variable.
        part: what the caller wants in it.

    Raises:
        SlimkitError: if neither is given or there is no folder `part` in it.
    """
    given = root or os.environ.get("SLIMKIT_DATA")
    if not given:
        raise SlimkitError(
            f"pass root, or set SLIMKIT_DATA to the data folder, which holds {part!r}"
        )
    folder = Path(given)
    if not (folder / part).is_dir():
        raise SlimkitError(f"there is no folder {part!r} in {folder.resolve()}")
    return folder
