"""`slimkit prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from slimkit.cli.output import emit, json_option

if TYPE_CHECKING:
    from torch import Tensor


@click.command()
@click.argument("model")
@click.option(
    "--input",
    "-i",
    "inputs",
    multiple=True,
    required=True,
    metavar="SHAPE[:DTYPE]",
    help="Shape of an example input with its batch, such as 1,3,224,224 or 1,64:int64; once for "
    "each input.",
)
@click.option(
    "--target",
    "-t",
    metavar="MEASURE=VALUE",
    help="How far: flops or params (the fraction that is left), size_mb (MiB left), ratio (of "
    "channels removed), or importance (share of its scores that each group keeps).  [default: "
    "flops=0.5, or none with --ratio; ratio=0.5 with element and block]",
)
@click.option(
    "--granularity",
    type=click.Choice(["channel", "element", "block", "2:4"]),
    default="channel",
    show_default=True,
    help="What is removed as a whole: channels; or, set to zero, which makes nothing faster, "
    "single weights, blocks of them, or two of each four along the inputs.",
)
@click.option(
    "--block-size",
    type=click.IntRange(min=1),
    nargs=2,
    metavar="OUT IN",
    help="Outputs and inputs of a block.  [default: 1 4]",
)
@click.option(
    "--ratio",
    "-r",
    "ratios",
    multiple=True,
    metavar="PATTERN=VALUE",
    help="Fraction of channels that matching layers lose, whatever the target; may be repeated.",
)
@click.option(
    "--ranking",
    type=click.Choice(["global", "local", "isomorphic"]),
    default="global",
    show_default=True,
    help="Rank the channels of all groups together, of each alone, or of equal structures.",
)
@click.option(
    "--max-ratio",
    metavar="VALUE[,VALUE]",
    help="The largest fraction of channels that a group may lose; two of them for the first and "
    "the last group of the model.",
)
@click.option("--criterion", "-c", default="l1", show_default=True, help="A plugin's name.")
@click.option(
    "--protect",
    "-p",
    multiple=True,
    metavar="PATTERN",
    help="Layers that keep all their channels; * and ? allowed; may be repeated.",
)
@click.option(
    "--protect-first/--no-protect-first",
    default=True,
    show_default=True,
    help="Whether the first convolution keeps its channels where the target allows it.",
)
@click.option(
    "--attention",
    type=click.Choice(["dimensions", "heads"]),
    default="dimensions",
    show_default=True,
    help="What attention loses: dimensions, each of them in all heads, or whole heads.",
)
@click.option(
    "--backend",
    "-b",
    "backends",
    multiple=True,
    metavar="NAME",
    help="A runtime that the model is for; channels are rounded to what it computes fastest.",
)
@click.option(
    "--round-to",
    type=click.IntRange(min=1),
    help="Keep a multiple of this many channels.  [default: as --backend likes it]",
)
@click.option("--min-channels", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--data",
    metavar="PATH",
    help="package.module:function that gives batches of (inputs, labels) or a data module, for "
    "criteria that need gradients and to re-estimate batch-norm.",
)
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="State dict (.safetensors or .pt) to load first.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the small model.  [default: runs/<function's name>]",
)
@click.option(
    "--gammas", "show_gammas", is_flag=True, help="First show how large batch-norm's gammas are."
)
@click.option("--plan", is_flag=True, help="Only show what would be cut; write nothing.")
@json_option("Print the result as JSON.")
def prune(
    model: str,
    inputs: tuple[str, ...],
    target: str | None,
    granularity: Literal["channel", "element", "block", "2:4"],
    block_size: tuple[int, int] | None,
    ratios: tuple[str, ...],
    ranking: Literal["global", "local", "isomorphic"],
    max_ratio: str | None,
    criterion: str,
    protect: tuple[str, ...],
    protect_first: bool,
    attention: Literal["dimensions", "heads"],
    backends: tuple[str, ...],
    round_to: int | None,
    min_channels: int,
    data: str | None,
    weights: Path | None,
    output: Path | None,
    show_gammas: bool,
    plan: bool,
    as_json: bool,
) -> None:
    """Cut channels out of MODEL at once, without training, and save the small model.

    MODEL is package.module:function, found in the current folder or among the installed packages.
    Every group of coupled channels is verified before anything is cut; what stays whole is listed
    with its reason. `slimkit.load(FOLDER)` gives the small model back, to train or to export it.

    \b
    Example:
        slimkit prune my_models:resnet50 --input 1,3,224,224 --target flops=0.5 --plan
        slimkit prune my_models:vit --input 1,3,224,224 --attention heads --ratio "*.attn=0.25"
    """  # noqa: D301 click keeps the lines behind its mark
    from slimkit.fields import is_import_path

    for path, hint in ((model, "MODEL"), (data, "--data")):
        if path is not None and not is_import_path(path):
            raise click.BadParameter(
                f"should look like 'package.module:function', not {path!r}", param_hint=hint
            )
    if block_size is not None and granularity != "block":
        raise click.BadParameter("needs --granularity block", param_hint="--block-size")
    if target is None and not ratios:
        fitting = {"channel": "flops=0.5", "2:4": None}
        target = fitting.get(granularity, "ratio=0.5")
    aim = dict([_pair(target, "--target", "flops=0.5")]) if target else None
    fixed = dict(_pair(text, "--ratio", "layer1=0.3") for text in ratios)
    limit = _limit(max_ratio)
    shapes = [_shape(text) for text in inputs]

    import json
    import warnings

    import torch
    from rich.console import Console
    from torch import nn

    import slimkit
    from slimkit.deploy.folder import check_target
    from slimkit.importing import build
    from slimkit.pruning.gammas import gammas
    from slimkit.report.gammas import gamma_table
    from slimkit.weights import load_weights

    folder = output or Path("runs") / model.rpartition(":")[2]
    if not plan:
        check_target(folder)
    torch.manual_seed(0)  # a model without weights is the same after --plan
    dense = build({"target": model}, "model", nn.Module).eval()
    if weights is not None:
        load_weights(dense, weights)
    layers = gammas(dense) if show_gammas else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = slimkit.prune(
            dense,
            tuple(_example(*shape) for shape in shapes),
            criterion,
            target=aim,
            ratios=fixed or None,
            ranking=ranking,
            max_ratio=limit,
            data=None if data is None else _batches(build({"target": data}, "data", object)),
            protect=protect,
            protect_first=protect_first,
            attention=attention,
            granularity=granularity,
            block_size=block_size or (1, 4),
            backend=backends,
            round_to=round_to,
            min_channels=min_channels,
        )
    report: Any = small.slimkit_pruning
    if not plan:
        slimkit.save(small, folder, built_by=model)
    if as_json:
        where = {} if plan else {"directory": str(folder)}
        shown = {"gammas": [vars(layer) for layer in layers]} if show_gammas else {}
        emit(json.dumps({**shown, **report.as_dict(), **where}, indent=1))
        return
    if layers:
        Console().print(gamma_table(layers))
    elif show_gammas:
        click.echo("the model has no batch-norm with gammas")
    click.echo(report)
    saved = f"saved to {folder}: slimkit.load({str(folder)!r}) gives it back"
    click.echo("nothing was written (--plan)" if plan else saved)


def _pair(text: str, option: str, example: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        raise click.BadParameter(
            f"should be such as {example}, not {text!r}", param_hint=option
        ) from None


def _batches(made: Any) -> Any:
    """What gives batches: the training data of a data module, or the thing itself."""
    if not hasattr(made, "train_dataloader"):
        return made
    made.prepare_data()
    made.setup("fit")
    return made.train_dataloader()


def _limit(text: str | None) -> float | list[float] | None:
    if text is None:
        return None
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"should be such as 0.6 or 0.2,0.6, not {text!r}", param_hint="--max-ratio"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def _shape(text: str) -> tuple[tuple[int, ...], str]:
    sizes, _, dtype = text.partition(":")
    try:
        shape = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise click.BadParameter(
            f"should be sizes such as 1,3,224,224, not {text!r}", param_hint="--input"
        )
    return shape, dtype or "float32"


def _example(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Noise of that shape; zeros and ones of an integer type, which any table has."""
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise click.BadParameter(f"torch has no type {dtype!r}", param_hint="--input")
    generator = torch.Generator().manual_seed(0)
    if kind.is_floating_point:
        return torch.randn(shape, generator=generator).to(kind)
    return torch.randint(0, 2, shape, generator=generator).to(kind)
