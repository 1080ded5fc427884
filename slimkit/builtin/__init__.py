"""What ships in the box, registered through the same hooks as a stranger's package."""

from __future__ import annotations

from collections.abc import Iterator

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_criteria() -> Iterator[Plugin]:
    """Pruning criteria."""
    here = "slimkit.builtin.criteria"
    yield Plugin("l1", f"{here}.magnitude:L1", "Sum of absolute weights")
    yield Plugin("l2", f"{here}.magnitude:L2", "Sum of squared weights")
    yield Plugin("fpgm", f"{here}.fpgm:FPGM", "Distance from the other filters")
    yield Plugin("bn-scale", f"{here}.bn_scale:BatchNormScale", "Scale of the batch-norm behind it")
    yield Plugin("lamp", f"{here}.lamp:LAMP", "Magnitude among larger weights")
    yield Plugin("taylor", f"{here}.taylor:Taylor", "First-order change of the loss")
    yield Plugin("hessian", f"{here}.hessian:Hessian", "Second-order change of the loss")
    yield Plugin("activation", f"{here}.activation:Activations", "Activations, mean or APoZ")
    yield Plugin("wanda", f"{here}.wanda:Wanda", "Weights times norms of inputs")
    yield Plugin("random", f"{here}.random:Random", "Random scores, the baseline to beat")


@hookimpl
def slimkit_quantizers() -> Iterator[Plugin]:
    """Quantizers."""
    here = "slimkit.builtin.quantizers"
    yield Plugin("minmax", f"{here}.minmax:MinMax", "Everything that was observed")
    yield Plugin("moving-average", f"{here}.moving_average:MovingAverage", "What batches span")
    yield Plugin("percentile", f"{here}.percentile:Percentile", "All but the rarest values")
    yield Plugin("kl", f"{here}.kl:KL", "Least loss of information (entropy)")
    yield Plugin("mse", f"{here}.mse:MSE", "The smallest rounding error")
    yield Plugin("aciq", f"{here}.aciq:ACIQ", "Least expected error, by formula")
    yield Plugin("lsq", f"{here}.lsq:LSQ", "A step size that training finds")
    yield Plugin("pact", f"{here}.pact:PACT", "A clip that training finds")


@hookimpl
def slimkit_losses() -> Iterator[Plugin]:
    """Distillation losses."""
    here = "slimkit.builtin.losses"
    yield Plugin("kl", f"{here}.kl:KL", "Divergence of class probabilities")
    yield Plugin("feature-mse", f"{here}.feature_mse:FeatureMSE", "Squared distance of features")


@hookimpl
def slimkit_backends() -> Iterator[Plugin]:
    """Hardware backends."""
    here = "slimkit.builtin.backends"
    yield Plugin("torch", f"{here}.reference:Reference", "The exported program, in PyTorch")
    yield Plugin("onnxruntime", f"{here}.onnxruntime:OnnxRuntime", "ONNX file for ONNX Runtime")
    yield Plugin("ncnn", f"{here}.ncnn:Ncnn", "ncnn files for phones and boards")
