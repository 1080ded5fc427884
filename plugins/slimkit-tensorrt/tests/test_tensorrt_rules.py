"""Each rule on a graph made by hand that breaks it, and on one that does not."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from slimkit_tensorrt.rules import rules


def constant(name, values, kind):
    return numpy_helper.from_array(np.asarray(values, kind), name)


def good(**changes):
    """x -> Q -> DQ -> Conv(W int8 -> DQ) -> Add(Q -> DQ of x) as parts that a test may change."""
    parts = {
        "scale": constant("scale", 0.1, np.float32),
        "zero": constant("zero", 0, np.int8),
        "weight": constant("weight", np.ones((4, 4, 1, 1)), np.int8),
        "w_scale": constant("w_scale", [0.1] * 4, np.float32),
        "w_zero": constant("w_zero", [0] * 4, np.int8),
        "q": helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "round"),
        "dq": helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], "back"),
        "dw": helper.make_node(
            "DequantizeLinear", ["weight", "w_scale", "w_zero"], ["w"], "weights", axis=0
        ),
        "conv": helper.make_node("Conv", ["dq", "w"], ["c"], "conv"),
        "add": helper.make_node("Add", ["c", "dq"], ["y"], "sum"),
        **changes,
    }
    initializers = [p for p in parts.values() if isinstance(p, TensorProto)]
    nodes = [p for p in parts.values() if p is not None and not isinstance(p, TensorProto)]
    value = helper.make_tensor_value_info
    shape = [1, 4, 2, 2]
    inputs = [value(name, TensorProto.FLOAT, shape) for name in ("x", "dynamic", "other")]
    outputs = [value("y", TensorProto.FLOAT, shape)]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, initializers))


node = helper.make_node
BROKEN = {
    "a zero point": (
        {"zero": constant("zero", 3, np.int8)},
        ["round: its zero point is not 0", "back: its zero point is not 0"],
    ),
    "a computed scale": (
        {"q": node("QuantizeLinear", ["x", "dynamic", "zero"], ["q"], "round")},
        ["round: its scale is computed"],
    ),
    "a computed zero point": (
        {"dq": node("DequantizeLinear", ["q", "scale", "dynamic"], ["dq"], "back")},
        ["back: its zero point is computed"],
    ),
    "a negative scale": (
        {"w_scale": constant("w_scale", [0.1, 0.1, -0.1, 0.1], np.float32)},
        ["weights: its scale is not positive"],
    ),
    "unsigned integers": (
        {"zero": constant("zero", 0, np.uint8)},
        ["round: its integers are uint8", "back: its integers are uint8"],
    ),
    "unsigned by default": (
        {"q": node("QuantizeLinear", ["x", "scale"], ["q"], "round")},
        ["round: its integers are uint8"],
    ),
    "a number of scales that is not the channels'": (
        {"w_scale": constant("w_scale", [0.1] * 3, np.float32)},
        ["weights: 3 scales along axis 0"],
    ),
    "an activation per channel": (
        {"scale": constant("scale", [0.1] * 4, np.float32)},
        ["round: an activation has a scale per channel", "back: an activation has a scale per"],
    ),
    "something between the pair": (
        {
            "clip": node("Clip", ["q"], ["clipped"], "clip"),
            "dq": node("DequantizeLinear", ["clipped", "scale", "zero"], ["dq"], "back"),
        },
        ["round: Clip stands between it and its DequantizeLinear"],
    ),
    "another scale on the way back": (
        {
            "scale2": constant("scale2", 0.2, np.float32),
            "dq": node("DequantizeLinear", ["q", "scale2", "zero"], ["dq"], "back"),
        },
        ["round: its DequantizeLinear has another scale"],
    ),
    "integers that nobody reads": (
        {"q2": node("QuantizeLinear", ["x", "scale", "zero"], ["unread"], "lost")},
        ["lost: nothing dequantizes"],
    ),
    "one scale for all channels": (
        {"w_scale": constant("w_scale", 0.1, np.float32), "w_zero": constant("w_zero", 0, np.int8)},
        ["conv: its weight has one scale"],
    ),
    "scales along the inputs": (
        {"dw": node("DequantizeLinear", ["weight", "w_scale", "w_zero"], ["w"], "weights", axis=1)},
        ["conv: its weight's scales run along axis 1, output channels along 0"],
    ),
    "a float input": (
        {"conv": node("Conv", ["x", "w"], ["c"], "conv")},
        ["conv: its weight is quantized and its input is not"],
    ),
    "integer weights without a scale": (
        {"conv": node("Conv", ["dq", "weight"], ["c"], "conv")},
        ["conv: its integer weight is not dequantized"],
    ),
    "a transposed weight": (
        {
            "turn": node("Transpose", ["w"], ["wt"], "turn"),
            "conv": node("Conv", ["dq", "wt"], ["c"], "conv"),
        },
        ["conv: a Transpose stands between"],
    ),
    "an integer bias": (
        {
            "bias": constant("bias", [1] * 4, np.int32),
            "db": node("DequantizeLinear", ["bias", "w_scale"], ["b"], "biases", axis=0),
            "conv": node("Conv", ["dq", "w", "b"], ["c"], "conv"),
        },
        ["biases: its integers are int32", "conv: its bias is quantized"],
    ),
    "one dimension": (
        {"weight": constant("weight", np.ones((4, 4, 1)), np.int8)},
        ["conv: TensorRT reads convolutions in 2 and 3 dimensions only"],
    ),
    "a float residual": (
        {"add": node("Add", ["c", "other"], ["y"], "sum")},
        ["sum: the residual input other is not quantized"],
    ),
    "a transposed convolution along axis 0": (
        {"conv": node("ConvTranspose", ["dq", "w"], ["c"], "conv")},
        ["conv: its weight's scales run along axis 0, output channels along 1"],
    ),
    "an operator that fuses by itself": (
        {"conv": node("QLinearConv", ["x"] * 8, ["c"], "conv")},
        ["conv: the parser does not read QLinearConv"],
    ),
}


def test_a_good_graph_has_no_problem():
    assert rules(good()) == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named_with_its_node_and_its_place_in_the_documentation(name):
    changes, expected = BROKEN[name]
    found = rules(good(**changes))
    for wanted in expected:
        (said,) = [text for text in found if wanted in text]
        assert said.endswith(")")
        assert said[said.rindex("(") :].strip("()").split(":")[0] in (
            "IQuantizeLayer, API reference",
            "Working with Quantized Types",
            "Explicit Quantization",
            "onnx-tensorrt",
        )
    if name not in ("a transposed weight", "an activation per channel", "a computed zero point"):
        assert len(found) == len(expected), found


def test_both_ways_to_write_a_matrix_have_their_axis():
    weight = constant("weight", np.ones((4, 4)), np.int8)
    for layer, axis in (("MatMul", 1), ("Gemm", 1), ("Gemm", 0)):
        options = {"transB": 1 - axis} if layer == "Gemm" else {}
        parts = {
            "weight": weight,
            "dw": node("DequantizeLinear", ["weight", "w_scale"], ["w"], "weights", axis=axis),
            "conv": node(layer, ["dq", "w"], ["c"], "layer", **options),
        }
        assert rules(good(**parts)) == []
        parts["dw"] = node("DequantizeLinear", ["weight", "w_scale"], ["w"], "w", axis=1 - axis)
        assert "output channels along" in rules(good(**parts))[0]


def test_a_sum_of_two_layers_that_stay_float_has_no_residual():
    plain = {"q": None, "dq": None, "dw": None, "add": node("Add", ["c", "x"], ["y"], "sum")}
    plain["float"] = constant("float", np.ones((4, 4, 1, 1)), np.float32)
    plain["conv"] = node("Conv", ["x", "float"], ["c"], "conv")
    assert rules(good(**plain)) == []
