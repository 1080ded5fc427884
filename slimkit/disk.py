"""Whether a disk is full, for code in C++ that does not say so."""

from __future__ import annotations

from pathlib import Path

_BLOCK = 1 << 16  # bytes


def refuse_full(folder: Path) -> None:
    """Raise what the system says if `folder` takes no more.

    Args:
        folder: where something else has just written, or tried to.

    Raises:
        OSError: the disk is full.
    """
    probe = folder / ".slimkit-probe"
    try:
        probe.write_bytes(bytes(_BLOCK))
    finally:
        probe.unlink(missing_ok=True)
