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
    yield Plugin("dkd", f"{here}.dkd:DKD", "Target and other classes apart")
    yield Plugin("dist", f"{here}.dist:DIST", "Correlation of class probabilities")
    yield Plugin("bce-logits", f"{here}.bce_logits:BCELogits", "Each class as a yes or no")
    yield Plugin("feature-mse", f"{here}.feature_mse:FeatureMSE", "Squared distance of features")
    yield Plugin("hint", f"{here}.hint:Hint", "Features through a projection")
    yield Plugin("cosine", f"{here}.cosine:Cosine", "Direction of features")
    yield Plugin("attention", f"{here}.attention:Attention", "Where features are strong")
    yield Plugin("cwd", f"{here}.cwd:CWD", "Where each channel is strong")
    yield Plugin("fsp", f"{here}.fsp:FSP", "How features turn into later ones")
    yield Plugin("rkd", f"{here}.rkd:RKD", "Distances and angles of samples")
    yield Plugin("similarity", f"{here}.similarity:Similarity", "Which samples are alike")
    yield Plugin("pkt", f"{here}.pkt:PKT", "Which samples are neighbours")
    yield Plugin("crd", f"{here}.crd:CRD", "Contrast with other samples")
    yield Plugin("box", f"{here}.box:Box", "Overlap of boxes, for detectors")


@hookimpl
def slimkit_backends() -> Iterator[Plugin]:
    """Hardware backends."""
    here = "slimkit.builtin.backends"
    yield Plugin("torch", f"{here}.reference:Reference", "The exported program, in PyTorch")
    yield Plugin("onnxruntime", f"{here}.onnxruntime:OnnxRuntime", "ONNX file for ONNX Runtime")
    yield Plugin("ncnn", f"{here}.ncnn:Ncnn", "ncnn files for phones and boards")
