"""The recipe: what to do to which model, as a strict tree, with YAML in and out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from slimkit.errors import RecipeError
from slimkit.fields import (
    Bits,
    Corrections,
    Count,
    Devices,
    Factor,
    Fraction,
    ImportPath,
    KeptFloat,
    Moment,
    NotAll,
    NotNone,
    OneOrTwo,
    Options,
    OverZero,
    Patterns,
    Place,
    Positive,
    Ratios,
    RewriteName,
    Share,
    TeacherName,
    bare,
    is_file,
    number_or,
    one_or_more,
)
from slimkit.strict_yaml import load
from slimkit.validation import Misfit, complaints


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Import(_Node):
    """A function or class of the user's, and what to call it with."""

    target: ImportPath = Field(description="package.module:name of a function or class.")
    options: Options = {}


class PluginRef(_Node):
    """A plugin by name, with options for its constructor."""

    name: str = Field(description="What `slimkit list-plugins` calls it.")
    options: Options = {}


class Rewrite(_Node):
    """A rewrite by name, with its options."""

    name: RewriteName = Field(description="One of docs/rewriting.md.")
    options: Options = {}


class Weight(_Node):
    """A factor that changes over the training."""

    value: Factor = Field(description="The factor; with warm-up, the one that is reached.")
    schedule: Literal["constant", "linear", "cosine", "warm-up", "decay"] = Field(
        default="constant",
        description="Over `during`: linear and cosine go from `value` to `to`, decay too, by the "
        "same fraction in equal times, and warm-up from 0 to `value`, linearly.",
    )
    to: Factor | None = Field(
        default=None,
        validate_default=True,
        description="Where linear, cosine and decay end; null: 0, or 1 % of `value` for decay.",
    )
    during: tuple[Fraction, Fraction] = Field(
        default=(0.0, 1.0), description="Begin and end, as fractions of the training."
    )

    @field_validator("to")
    @classmethod
    def _somewhere(cls, to: float | None, info: ValidationInfo) -> float | None:
        schedule = info.data.get("schedule", "linear")
        if to is not None and schedule in ("constant", "warm-up"):
            raise ValueError(f"is where a schedule ends that {schedule} has not: leave it out")
        if schedule == "decay" and (to == 0 or info.data.get("value") == 0):
            raise ValueError("decay never reaches 0: choose linear, or more than 0")
        return to

    @field_validator("during")
    @classmethod
    def _in_order(cls, during: tuple[float, float]) -> tuple[float, float]:
        if during[0] > during[1]:
            raise ValueError(f"should begin before it ends, not {list(during)}")
        return during


if TYPE_CHECKING:
    AWeight = float | Weight
else:  # a union would put its members' names into the paths of problems
    AWeight = Annotated[Weight, number_or(Factor | Weight), PlainSerializer(lambda weight: weight)]


class Loss(PluginRef):
    """A distillation loss, where it is applied, and its share."""

    at: Place = Field(
        default="output",
        description="Whose tensors to compare: 'output', the path of a module, or the student's "
        "and the teacher's path. A part of what a module gives: output.logits, head.cls[0], "
        'backbone["c3"]. Each side is a list where a loss compares several places at once, and '
        "[[first, second]] means the same on both.",
    )
    weight: AWeight = Field(
        default=1.0, description="Factor in the sum of losses, or a schedule of it."
    )

    @property
    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Where the student's and where the teacher's tensors are taken."""
        student, teacher = (self.at, self.at) if isinstance(self.at, str) else self.at
        return (
            (student,) if isinstance(student, str) else student,
            (teacher,) if isinstance(teacher, str) else teacher,
        )


class Teacher(_Node):
    """Whom the student learns from."""

    name: TeacherName = Field(
        description="dense: the model as it was before; ema: an average of the student's own "
        "weights; mutual: a copy of the model that is trained beside the student and learns from "
        "it; package.module:name of a function that returns a model; or the path of an artifact, "
        "or of a weights file for the model itself.",
    )
    options: Options = {}
    weights: Path | None = Field(
        default=None,
        description="State dict to load into the teacher; relative to the current folder.",
    )
    weight: Factor = Field(default=1.0, description="Its share among several teachers.")
    decay: NotAll | None = Field(
        default=None,
        description="What the average of ema keeps of itself at a step; null: 0.999.",
    )
    learns: bool = Field(
        default=False,
        description="Whether it is a peer, trained beside the student by the same optimizer, that "
        "learns from the student in turn; mutual always is.",
    )

    @property
    def kind(self) -> Literal["dense", "ema", "mutual", "import", "file"]:
        """What its name stands for."""
        if self.name in ("dense", "ema", "mutual"):
            return self.name  # type: ignore[return-value]  # one of these
        return "file" if is_file(self.name) else "import"

    @property
    def is_fixed(self) -> bool:
        """Whether it gives the same for the same inputs throughout the training."""
        return self.kind not in ("ema", "mutual") and not self.learns

    @model_validator(mode="after")
    def _options_of_its_kind(self) -> Self:
        kind = self.kind
        if self.options and kind != "import":
            raise ValueError(f"{self.name} takes no options; package.module:name does")
        if self.weights is not None and kind not in ("dense", "import"):
            raise ValueError(f"{self.name} takes no weights; dense and package.module:name do")
        if self.learns and kind in ("ema", "file"):
            raise ValueError(f"{self.name} cannot learn; dense and package.module:name can")
        if self.decay is not None and kind != "ema":
            raise ValueError(f"{self.name} has no decay; ema has")
        return self


class Metric(_Node):
    """The validation metric that accuracy gates are about."""

    name: str = Field(description="As the LightningModule logs it, such as val_accuracy.")
    mode: Literal["max", "min"] = Field(
        default="max", description="Whether larger or smaller is better."
    )


AnImport = Annotated[Import, bare("target", str | Import)]
APlugin = Annotated[PluginRef, bare("name", str | PluginRef)]
ARewrite = Annotated[Rewrite, bare("name", str | Rewrite)]
ATeacher = Annotated[Teacher, bare("name", str | Teacher)]
Teachers = Annotated[tuple[ATeacher, ...], one_or_more(str | Teacher | tuple[str | Teacher, ...])]
ALoss = Annotated[Loss, bare("name", str | Loss)]
AMetric = Annotated[Metric, bare("name", str | Metric)]


class Optimizer(_Node):
    """The optimizer of a plain nn.Module; a LightningModule brings its own."""

    name: Literal["sgd", "adamw"] = Field(default="sgd", description="Which algorithm.")
    lr: OverZero = Field(default=0.01, description="Learning rate after warm-up.")
    momentum: NotAll = Field(default=0.9, description="Only used by sgd.")
    weight_decay: Factor = Field(default=5e-4, description="Decay of all weights.")
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="After warm-up.")
    warmup: Fraction = Field(
        default=0.05, description="Fraction of the steps until `lr` is reached."
    )


class Pretrain(_Node):
    """Train the dense model first, where the model function returns an untrained one."""

    max_epochs: Positive = Field(description="How many epochs.")
    optimizer: Optimizer = Field(default=Optimizer(), description="Used for this training only.")


class Target(_Node):
    """How far to prune: exactly one of them."""

    flops: NotNone | None = Field(
        default=None, description="Fraction of the multiply-adds that is left; 0.5 halves them."
    )
    params: NotNone | None = Field(
        default=None, description="Fraction of the parameters that is left."
    )
    ratio: NotAll | None = Field(
        default=None, description="Fraction of the channels that is removed."
    )
    size_mb: OverZero | None = Field(
        default=None, description="MiB of all parameters and buffers that is left."
    )
    importance: Share | None = Field(
        default=None,
        description="Share of its scores' sum that each group keeps, in the fewest channels.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self._given()) != 1:
            given = " and ".join(self._given()) or "none of them"
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"needs exactly one of {names}; not {given}")
        return self

    def _given(self) -> dict[str, float]:
        return {name: value for name, value in self if value is not None}

    @property
    def kind(self) -> str:
        """Which of them is given: flops, params, ratio, size_mb or importance."""
        return next(iter(self._given()))

    @property
    def value(self) -> float:
        """The fraction, or the MiB, that is given."""
        return next(iter(self._given().values()))


class Regularizer(_Node):
    """A penalty that makes channels small before they are removed."""

    name: Literal["bn-scale", "group-lasso", "growing"] = Field(
        description="The sum of batch-norm's gammas; the sum of the channels' L2 norms over all "
        "coupled layers; or an L2 penalty that grows on the channels that score least, best with "
        "'schedule: one-shot', which removes them when it has grown.",
    )
    strength: OverZero | None = Field(
        default=None,
        description="Factor of the penalty, for growing at the end of `during`; null: 1e-4 for "
        "bn-scale, as for a long training, 1e-2 for group-lasso, 1 for growing.",
    )


ARegularizer = Annotated[Regularizer, bare("name", str | Regularizer)]


class Prune(_Node):
    """Remove channels during a part of the training."""

    criterion: APlugin = Field(
        default=PluginRef(name="l1"), description="What makes a channel important."
    )
    granularity: Literal["channel", "element", "block", "2:4"] = Field(
        default="channel",
        description="What is removed as a whole. Of convolutions and linear layers, element zeroes "
        "single weights, block blocks of them, and 2:4 two of each four along the input dimension; "
        "zeros make files compress better, but nothing faster.",
    )
    block_size: tuple[Positive, Positive] | None = Field(
        default=None,
        description="Outputs and inputs of a block; null: [1, 4] where granularity is block.",
    )
    ratios: Ratios = Field(
        default={},
        description="Fraction of the channels that modules lose whatever the target, by name; "
        "* and ? allowed, the first that fits counts. Or sensitivity: what `slimkit sensitivity` "
        "measures says how much each group loses, such that the loss grows least.",
    )
    target: Target | None = Field(
        default=None,
        validate_default=True,
        description="How far to prune; may be left out where `ratios` says what is removed. For "
        "element and block `ratio`, the fraction of the weights that is zero; none for 2:4.",
    )
    ranking: Literal["global", "local", "isomorphic"] = Field(
        default="global",
        description="What is ranked together: all channels; each group, all losing the same "
        "fraction; or groups of the same structure, each structure losing the same fraction.",
    )
    max_ratio: OneOrTwo | None = Field(
        default=None,
        description="Largest fraction of its channels that a group may lose, or two for the first "
        "and the last group; null: 0.95, or the target's ratio where that is more.",
    )
    during: tuple[Moment, Moment] = Field(
        default=(0.0, 0.4),
        description="Begin and end: fractions of the training from 0 to 1, or whole numbers of "
        "optimizer steps above 1.",
    )
    steps: Positive = Field(
        default=10, description="How often more is masked between begin and end."
    )
    schedule: Literal["cubic", "linear", "iterative", "one-shot"] = Field(
        default="cubic",
        description="How the pruned fraction grows between begin and end: most of it early, "
        "evenly, the same fraction of what is left at each step, or all at the end.",
    )
    regularizer: ARegularizer | None = Field(
        default=None,
        description="Penalty on the channels that may go, from the begin of the training (growing: "
        "of `during`) until they are removed.",
    )
    engine: Literal["slimkit", "export", "torch-pruning"] = Field(
        default="slimkit", description="What finds the channels that belong together."
    )
    protect: Patterns = Field(
        default=(), description="Modules that keep all channels; * and ? allowed."
    )
    protect_first: bool = Field(
        default=True,
        description="Whether the first convolution over an image or a signal keeps its channels, "
        "where the target can be reached without it.",
    )
    attention: Literal["dimensions", "heads"] = Field(
        default="dimensions",
        description="What goes in attention: dimensions, each in all heads, or whole heads.",
    )
    round_to: Positive | None = Field(
        default=None,
        description="Keep a multiple of this many channels; null: of what the runtimes in `export` "
        "compute fastest.",
    )
    min_channels: Positive = Field(default=1, description="Keep at least this many channels.")
    batchnorm_batches: Count = Field(
        default=20,
        description="Batches to re-estimate batch-norm statistics with after the cut; 0: off.",
    )
    data_batches: Positive = Field(
        default=8, description="Batches for criteria that need gradients or activations."
    )

    @field_validator("target")
    @classmethod
    def _or_ratios(cls, target: Target | None, info: ValidationInfo) -> Target | None:
        granularity = info.data.get("granularity", "channel")
        if granularity == "2:4":
            if target is not None:
                raise ValueError("2:4 zeroes half of the weights, always: leave the target out")
            return target
        if granularity != "channel" and (target is None or target.kind != "ratio"):
            raise ValueError(
                f"granularity {granularity} needs ratio, the fraction of the weights that is zero"
            )
        if target is None and info.data.get("ratios") == {}:
            raise ValueError("is required, unless 'ratios' says what is removed")
        if info.data.get("ratios") == "sensitivity" and (
            target is None or target.kind not in ("flops", "params")
        ):
            given = "none" if target is None else f"{target.kind}: {target.value:g}"
            raise ValueError(f"should be flops or params with 'ratios: sensitivity', not {given}")
        return target

    @field_validator("block_size")
    @classmethod
    def _of_blocks(
        cls, block_size: tuple[int, int] | None, info: ValidationInfo
    ) -> tuple[int, int] | None:
        granularity = info.data.get("granularity", "block")
        if block_size is not None and granularity != "block":
            raise ValueError(f"needs granularity block, not {granularity}")
        return block_size

    @field_validator(
        "ratios",
        "ranking",
        "engine",
        "attention",
        "round_to",
        "min_channels",
        "regularizer",
    )
    @classmethod
    def _of_channels(cls, value: Any, info: ValidationInfo) -> Any:
        granularity = info.data.get("granularity", "channel")
        name = info.field_name or ""
        fits = ("global", "local") if name == "ranking" else (cls.model_fields[name].default,)
        if granularity != "channel" and value not in fits:
            raise ValueError(f"is about channels: leave it out with granularity {granularity}")
        return value

    @field_validator("during")
    @classmethod
    def _in_order(cls, during: tuple[float | int, float | int]) -> tuple[float | int, float | int]:
        if type(during[0]) is type(during[1]) and during[0] > during[1]:
            raise ValueError(f"should begin before it ends, not {list(during)}")
        return during

    @field_validator("regularizer")
    @classmethod
    def _has_time(cls, regularizer: Regularizer | None, info: ValidationInfo) -> Regularizer | None:
        begin, end = info.data.get("during", (0.0, 1.0))
        if regularizer is not None and regularizer.name == "growing" and begin == end:
            raise ValueError(f"growing needs time, but 'during' begins and ends at {end}")
        return regularizer


class Distill(_Node):
    """What the compressed model learns from a teacher, or several."""

    teacher: Teachers = Field(
        default=(Teacher(name="dense"),),
        description="The model as it was before (dense), or others; a list for several.",
        json_schema_extra={"minItems": 1},
    )
    weighting: Literal["fixed", "confidence"] = Field(
        default="fixed",
        description="How several teachers share: each loss by their weights, or what they give is "
        "averaged sample by sample, those counting most that are surest of the sample's label; the "
        "first loss names their logits.",
    )
    losses: tuple[ALoss, ...] = Field(
        default=(Loss(name="kl", options={"temperature": 4.0}, weight=0.5),),
        description="What is minimised next to the task's own loss.",
        json_schema_extra={"minItems": 1},
    )
    label_weight: AWeight = Field(
        default=1.0, description="Factor of the task's own loss, or a schedule of it."
    )
    precision: Literal["bf16"] | None = Field(
        default=None,
        description="bf16: teachers compute in bfloat16; null: as the student trains.",
    )
    cache: Path | None = Field(
        default=None,
        description="Folder that keeps what fixed teachers give for inputs that come again, so "
        "that they need not compute it twice; of use where training data are not augmented anew, "
        "or the same training is run again.",
    )

    @field_validator("teacher")
    @classmethod
    def _one_at_least(cls, teachers: tuple[Teacher, ...]) -> tuple[Teacher, ...]:
        if not teachers:
            raise ValueError("names none; write 'distill: false' to learn from the labels only")
        if not any(teacher.weight for teacher in teachers):
            raise ValueError("all teachers have the weight 0: nothing would be learnt from them")
        return teachers

    @field_validator("weighting")
    @classmethod
    def _among_several(cls, weighting: str, info: ValidationInfo) -> str:
        if weighting == "confidence" and len(info.data.get("teacher", (1, 2))) < 2:
            raise ValueError("confidence is shared by several teachers; 'teacher' names one")
        return weighting

    @field_validator("losses")
    @classmethod
    def _some(cls, losses: tuple[Loss, ...]) -> tuple[Loss, ...]:
        if not losses:
            raise ValueError("names no loss; write 'distill: false' to learn from the labels only")
        return losses

    @field_validator("cache")
    @classmethod
    def _of_something(cls, cache: Path | None, info: ValidationInfo) -> Path | None:
        teachers = info.data.get("teacher", ())
        if cache is not None and teachers and not any(t.is_fixed for t in teachers):
            names = ", ".join(t.name for t in teachers)
            raise ValueError(f"{names} gives something else at each step: leave the cache out")
        return cache


class Quantize(_Node):
    """Round weights and activations to the integers of the backends."""

    weights: APlugin = Field(default=PluginRef(name="minmax"), description="Quantizer of weights.")
    activations: APlugin = Field(
        default=PluginRef(name="percentile"), description="Quantizer of activations."
    )
    train_from: NotAll | None = Field(
        default=None,
        description="Fraction of the training after which rounding is on; null: only after.",
    )
    freeze_ranges_at: NotAll | None = Field(
        default=None,
        description="Fraction of the training after which ranges of activations that are learned "
        "or followed stay as they are; null: never.",
    )
    freeze_batchnorm_at: NotAll | None = Field(
        default=None,
        description="Fraction of the training after which batch-norm layers keep their running "
        "statistics and compute with them; null: never.",
    )
    observe: Literal["once", "always"] = Field(
        default="once",
        description="Whether ranges of activations are those of the first `calibration_batches` "
        "or go on following the data of quantization-aware training.",
    )
    learning_rate_scale: OverZero = Field(
        default=1.0, description="Learning rate of learned ranges over that of the weights."
    )
    weight_decay: Factor = Field(
        default=0.0, description="Decay of learned ranges; pact's paper wants that of the weights."
    )
    weight_bits: Bits | None = Field(
        default=None,
        description="Width of the weights' integers, if narrower than the backends' own; the files "
        "store and compute them as those, no smaller and no faster. Left out, as wide as this "
        "machine's runtime sums rightly: 7 in ONNX Runtime and OpenVINO on x86 without VNNI.",
    )
    calibration_batches: Positive = Field(
        default=16, description="Training batches for the ranges."
    )
    keep_float: KeptFloat = Field(
        default=(),
        description="Modules that stay float; * and ? allowed. auto finds the fewest places whose "
        "rounding costs more than gates.accuracy_drop (0.01 without one) on the validation data.",
    )

    corrections: Corrections = Field(
        default=(),
        description="What makes up for rounding, after training: equalize, rounding, batchnorm, "
        "bias; auto: those that measurably help.",
    )

    @field_validator("freeze_ranges_at", "freeze_batchnorm_at")
    @classmethod
    def _while_rounding(cls, at: float | None, info: ValidationInfo) -> float | None:
        begin = info.data.get("train_from", 0.0)
        if at is not None and begin is None:
            raise ValueError("needs 'train_from': without it nothing is trained on integers")
        if at is not None and at < begin:
            raise ValueError(f"should not be before train_from ({begin}), not {at}")
        return at

    @field_validator("corrections")
    @classmethod
    def _without_training(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if names and info.data.get("train_from") is not None:
            raise ValueError("work on trained networks, not with train_from: leave one of them out")
        return names

    @field_validator("keep_float")
    @classmethod
    def _after_training(cls, kept: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if "auto" in kept and info.data.get("train_from") is not None:
            raise ValueError(
                "auto works on trained networks, not with train_from: name the places that "
                "`slimkit sensitivity --quantize` ranks first"
            )
        return kept

    @field_validator("observe")
    @classmethod
    def _in_training(cls, observe: str, info: ValidationInfo) -> str:
        if observe == "always" and info.data.get("train_from", 0.0) is None:
            raise ValueError("'always' needs 'train_from': ranges follow the data of a training")
        return observe


class Gates(_Node):
    """What the deployed file must reach, or the run fails with exit code 3."""

    accuracy_drop: Factor | None = Field(
        default=None,
        description="Largest drop of the deployed file's metric against the dense model's, in the "
        "metric's own unit: 0.01 is one point of an accuracy between 0 and 1.",
    )
    macs_ratio: NotNone | None = Field(
        default=None, description="Largest multiply-adds of the compressed over the dense model."
    )
    params_ratio: NotNone | None = Field(
        default=None, description="Largest parameter count of the compressed over the dense model."
    )
    latency_ratio: OverZero | None = Field(
        default=None,
        description="Largest latency of the deployed file over the dense float file on the same "
        "runtime.",
    )
    size_ratio: OverZero | None = Field(
        default=None, description="Largest size of the deployed file over the dense float file's."
    )
    agreement: Fraction | None = Field(
        default=None,
        description="Smallest fraction of inputs where the deployed file's top-1 answer is the "
        "simulation's.",
    )


class Trainer(BaseModel):
    """Arguments of Lightning's Trainer; any further one may be given."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    max_epochs: Count = Field(
        default=10, description="0 prunes at once and quantizes after training."
    )
    seed: Count = Field(
        default=0, le=2**32 - 1, description="Of all random numbers; not an argument of Trainer."
    )
    accelerator: str = Field(default="auto", description="cpu, gpu, auto ...")
    devices: Devices = Field(default="auto", description="How many or which.")

    @model_validator(mode="after")
    def _plain(self) -> Trainer:
        """Refuse what stands for an object in Python: a recipe holds plain data."""
        given = self.model_extra or {}
        if given.get("callbacks"):
            raise ValueError(
                "callbacks: a recipe cannot name them; return them from your LightningModule's "
                "configure_callbacks"
            )
        if not isinstance(given.get("logger", True), bool):
            raise ValueError(
                "logger: must be true or false; others are given to a Trainer of your own"
            )
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """What to call Trainer with."""
        return self.model_dump(exclude={"seed"})


class Recipe(_Node):
    """One compression run, from a trained model to files that a device runs."""

    version: Literal[1] = Field(default=1, description="Of this format.")
    model: AnImport | None = Field(
        default=None, description="Returns an nn.Module, or a LightningModule."
    )
    network: str | None = Field(
        default=None,
        description="Dotted path of the part of the model that is compressed; null: all of it.",
    )
    data: AnImport | None = Field(default=None, description="Returns a LightningDataModule.")
    task: Literal["classification"] | None = Field(
        default=None,
        description="Gives an nn.Module its loss and metric; a LightningModule has its own.",
    )
    metric: AMetric | None = Field(default=None, description="null: the first validation metric.")
    weights: Path | None = Field(
        default=None,
        description="State dict to load into the model; relative to the current folder.",
    )
    pretrain: Pretrain | None = Field(default=None, description="Train the dense model first.")
    output: Path | None = Field(
        default=None, description="Folder; null: runs/ and the recipe's name."
    )
    rewrite: tuple[ARewrite, ...] = Field(
        default=(),
        description="What is rewritten for the target before anything else, in order: exact "
        "rewrites are verified, what approximate ones cost is measured, and training recovers it.",
    )
    prune: Prune | None = Field(default=None, description="Remove channels.")
    distill: Distill | None = Field(
        default=Distill(), description="Learn from the dense model; false or null turns it off."
    )
    quantize: Quantize | None = Field(default=None, description="Compute in integers.")
    export: tuple[APlugin, ...] = Field(
        default=(PluginRef(name="onnxruntime"),),
        description="Backends to make files for.",
        json_schema_extra={"minItems": 1},
    )
    gates: Gates = Field(default=Gates(), description="What the deployed files must reach.")
    optimizer: Optimizer = Field(
        default=Optimizer(), description="Used where the model is an nn.Module."
    )
    trainer: Trainer = Field(default=Trainer(), description="Arguments of Lightning's Trainer.")

    @field_validator("distill", mode="before")
    @classmethod
    def _off(cls, distill: Any) -> Any:
        return None if distill is False else distill

    @field_validator("export")
    @classmethod
    def _each_once(cls, export: tuple[PluginRef, ...]) -> tuple[PluginRef, ...]:
        if not export:
            raise ValueError("names no backend; see 'slimkit list-plugins --kind backend'")
        names = [backend.name for backend in export]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names {', '.join(twice)} more than once")
        return export

    @model_validator(mode="after")
    def _quantize_after_the_cut(self) -> Self:
        if self.prune and self.quantize and self.quantize.train_from is not None:
            begin, end = self.quantize.train_from, self.prune.during[1]
            if isinstance(end, float) and begin < end:  # steps are compared when training starts
                raise Misfit(
                    "quantize.train_from",
                    f"should not be before the end of prune.during ({end}), not {begin}",
                )
        return self

    @model_validator(mode="after")
    def _not_padded_before_the_cut(self) -> Self:
        names = [rewrite.name for rewrite in self.rewrite]
        if self.prune and self.prune.granularity == "channel" and "pad-channels" in names:
            raise Misfit(
                f"rewrite[{names.index('pad-channels')}]",
                "pruning would take the channels of zeros first: leave pad-channels out, and say "
                "prune.round_to instead",
            )
        return self

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The recipe in a YAML file; raises `RecipeError` with every problem in it."""
        document = load(path)
        try:
            return cls.parse(document)
        except RecipeError as error:
            raise RecipeError(f"{path} cannot be used:", error.problems) from error

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Self:
        """The recipe in a mapping; raises `RecipeError` with every problem in it."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise RecipeError("the recipe cannot be used:", complaints(error, cls)) from error

    def to_yaml(self) -> str:
        """The whole recipe with all defaults, such that `parse` gives it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of the YAML file, for editors."""
        return cls.model_json_schema()
