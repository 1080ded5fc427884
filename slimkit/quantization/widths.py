"""What is said where a device sums products of narrower weights rightly than its scheme allows."""

from __future__ import annotations

from slimkit.interfaces import Backend


def width_remark(backend: Backend, weight_bits: int | None) -> str | None:
    """One sentence on the weights' width; None where there is nothing to say.

    Args:
        backend: runs the file.
        weight_bits: the width that was asked for; None for none.
    """
    right, own = backend.weight_bits(), backend.scheme.weights.bits
    if right is None or (weight_bits is not None and weight_bits <= right):
        return None
    why = f"sums of products of {own}-bit weights overflow on the processor that runs the file"
    if weight_bits is None:
        return (
            f"weights are of {right} bits: {why}; for a device on which they do not, such as Arm "
            f"and x86 with VNNI, set weight_bits to {own}"
        )
    return f"{why}: leave weight_bits out, or set it to {right}, unless the file is for another"
