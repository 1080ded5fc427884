"""Says whether int8 pays on a runtime, what holds it back, and what would help."""

from __future__ import annotations

from collections.abc import Iterable

from slimkit.deploy.release import Row, is_integer

LITTLE = 0.8
"""Where int8 takes more than this share of the float time, the report says what holds it back."""

_REMEDIES = (
    (
        ("Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Mish", "Gelu", "Erf", "Tanh", "Exp")
        + ("LOGISTIC", "HARD_SWISH", "GELU", "TANH", "ELU", "LEAKY_RELU"),
        "an activation computed in float needs a conversion on either side; ReLU, ReLU6 or a clamp "
        "merge into the integer layer in front of them",
    ),
    (
        ("Conv", "FusedConv", "Convolution", "ConvolutionDepthWise", "DeconvolutionDepthWise")
        + ("ConvTranspose", "Deconvolution", "Gemm", "FusedGemm", "InnerProduct", "MatMul")
        + ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL"),
        "layers that were left in float cost most where they stand alone between integer ones: "
        "look at quantize.keep_float and at what the quantization skipped",
    ),
    (
        ("Softmax", "LayerNormalization", "LayerNorm", "InstanceNormalization", "GroupNorm")
        + ("SOFTMAX", "RSQRT", "SQUARED_DIFFERENCE"),
        "normalizations over the data stay in float; int8 pays with wider layers between them",
    ),
    (
        ("Concat", "Add", "Sub", "Mul", "Div", "BinaryOp", "Resize", "Interp", "Slice", "Split")
        + ("Pad", "Transpose", "Reshape", "AveragePool", "ReduceMean", "Pooling", "Reduction")
        + ("CONCATENATION", "ADD", "SUB", "MUL", "MEAN", "AVERAGE_POOL_2D", "RESIZE_BILINEAR"),
        "elementwise and moving operations in float sit between integer layers: quantize what lies "
        "around them as well, or keep that whole block in float with quantize.keep_float",
    ),
    (
        ("QuantizeLinear", "DequantizeLinear", "Quantize", "Dequantize", "Requantize")
        + ("QUANTIZE", "DEQUANTIZE"),
        "conversions between float and integers are paid wherever a float operator stands between "
        "integer ones; fewer such places, or whole blocks in float, save them",
    ),
)
"""What would help, by the operator types that cost the time."""

_SLOW_INTEGERS = (
    "the integer layers themselves are not faster than the float ones: depthwise convolutions and "
    "few channels gain little; round the channels (prune.round_to), keep such layers in float "
    "(quantize.keep_float), or use larger inputs"
)


def verdicts(rows: Iterable[Row]) -> dict[str, str]:
    """Per runtime, whether int8 is worth it against float of the same model."""
    found = {}
    rows = list(rows)
    plain = {row.runtime: row for row in rows if row.stage == "compressed" and not row.variant}
    small = {row.runtime: row for row in rows if row.stage == "int8"}
    for runtime, base in plain.items():
        others = [row for row in rows if row.runtime == runtime and row.variant]
        said = _verdict(base, small.get(runtime), others)
        if said:
            found[runtime] = said
    return found


def _verdict(plain: Row, int8: Row | None, variants: list[Row]) -> str:
    """The sentences for one runtime, without a full stop behind the last."""
    best = min(variants, key=lambda row: row.latency.median_ms, default=None)
    gain = None if best is None else _ratio(best, plain)
    if int8 is None:
        if best is None or gain is None or gain >= 1:
            return ""
        return f"the runtime's own {best.variant} takes {gain:.2f} of the float32 time"
    ratio = _ratio(int8, plain)
    said = []
    if best is not None and gain is not None and gain < min(1.0, ratio):
        said.append(
            f"the runtime's own {best.variant} takes {gain:.2f} of the float32 time, less than "
            f"int8 ({ratio:.2f}): deploy float with {best.variant}"
        )
    elif ratio >= 1:
        said.append(
            f"int8 is not worth it here: it takes {ratio:.2f} of the float time; deploy the float "
            "file, or use a larger model or input"
        )
    else:
        said.append(_faster(plain, int8, ratio))
    if ratio > LITTLE:
        said += held_back(plain, int8)
    return ". ".join(said)


def _ratio(row: Row, plain: Row) -> float:
    return row.latency.median_ms / plain.latency.median_ms


def _faster(plain: Row, int8: Row, ratio: float) -> str:
    """What int8 takes where it pays on one thread, and on all threads where that was measured."""
    if plain.latency_all is None or int8.latency_all is None:
        return f"int8 takes {ratio:.2f} of the float time"
    every = int8.latency_all.median_ms / plain.latency_all.median_ms
    if every >= 1:
        return (
            f"int8 pays on one thread only: there it takes {ratio:.2f} of the float time, on "
            f"{int8.threads} threads {every:.2f}"
        )
    return f"int8 takes {ratio:.2f} of the float time ({every:.2f} on {int8.threads} threads)"


def held_back(plain: Row, int8: Row) -> list[str]:
    """Sentences on the float operators of an int8 file and what they cost; none where unknown."""
    times = {name: ms for name, ms in int8.operator_ms.items() if not is_integer(name)}
    total, spent = sum(int8.operator_ms.values()), sum(times.values())
    if not int8.operator_ms:
        return _counted(int8)
    said = []
    top = sorted(times, key=times.__getitem__, reverse=True)[:4]
    top = [name for name in top if times[name] >= 0.03 * total]
    if top:
        parts = ", ".join(f"{_count(int8, name)}{name} {times[name]:.3g} ms" for name in top)
        said.append(
            f"In its file float operators take {spent:.3g} of {total:.3g} ms "
            f"({spent / total:.0%}): {parts}"
        )
        if spent >= 0.15 * total:
            said += _remedies(top)
    integer = total - spent
    weighted = sum(ms for name, ms in plain.operator_ms.items() if name in _WEIGHTED)
    if weighted and integer >= 0.9 * weighted:
        said.append(
            f"Its integer operators take {integer:.3g} ms, the float file's layers {weighted:.3g} "
            f"ms; {_SLOW_INTEGERS}"
        )
    return said


_WEIGHTED = frozenset(_REMEDIES[1][0])


def _counted(int8: Row) -> list[str]:
    """The same by number alone, where the runtime does not tell its times."""
    floats = {name: n for name, n in int8.operators.items() if not is_integer(name)}
    top = [name for name in sorted(floats, key=floats.__getitem__, reverse=True) if name in _KNOWN]
    if not top or len(floats) == len(int8.operators):
        return []
    parts = ", ".join(f"{floats[name]} {name}" for name in top[:4])
    integers = sum(int8.operators.values()) - sum(floats.values())
    said = f"Beside {integers} integer operators its file executes in float: {parts}"
    return [said, *_remedies(top[:1])]


_KNOWN = frozenset(name for names, _ in _REMEDIES for name in names) - {"Split", "Reshape"}
"""What costs time wherever it stands; ncnn splits and reshapes without moving anything."""


def _remedies(names: list[str]) -> list[str]:
    """What helps against the operators, the dearest first, at most two sentences."""
    found = [text for name in names for known, text in _REMEDIES if name in known]
    return [text[0].upper() + text[1:] for text in dict.fromkeys(found)][:2]


def _count(row: Row, name: str) -> str:
    return f"{row.operators[name]} " if name in row.operators else ""
