r"""Networks by targets: what preflight foretold, what the files then did, and at what cost.

    PYTHONPATH=.:benchmarks python benchmarks/zoo/targets.py --output runs/targets \
        --data ../shared/data --python litert=.venv-litert/bin/python \
        --python executorch=.venv-executorch/bin/python

With --data the pretrained networks of benchmarks/tasks.py come first; their files, and those of ten
of the zoo, are timed and weighed as well. An interrupted run goes on where it stopped: what is in
results.jsonl is not run again.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.progress import track
from rows import Row, architectures, cell, keep_, kept, machine, row_of

RUNTIMES = ("onnxruntime", "openvino", "ncnn", "tensorrt", "litert", "executorch")
SLOW = ("litert", "executorch")  # to compile: they come last
PRETRAINED = (
    "resnet20", "resnet56", "resnet8", "resnet8_wide", "mobilenet_v1", "squeezenet", "yolox_nano",
    "fastestdet", "sst2",
)  # fmt: skip
HEAVY = {
    "vgg11_bn", "wide_resnet50_2", "inception_v3", "vit_b_16", "swin_v2_t", "maxvit_t",
    "fcn_resnet50", "deeplabv3_mobilenet_v3_large", "hrnet_w18_small", "nfnet_f0", "xception41",
    "efficientnet_v2_s", "dla34", "cspdarknet53", "coat_tiny", "twins_pcpvt_small",
}  # fmt: skip
"""Left out: 40 of the zoo remain, on which all targets can be tried in an hour or two."""
MEASURED = (
    "resnet18", "mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_x1_0", "squeezenet1_1",
    "efficientnet_b0", "regnet_y_400mf", "ghostnet_100", "convnextv2_atto", "deit_tiny_patch16_224",
)  # fmt: skip
"""Ten of the zoo, whose files are measured as well."""
LEAST_DB = {"float": 40.0, "int8": 20.0}
"""Of a file against the model or the simulation: below it the file does not work."""


def works(row: Row, kind: str) -> bool:
    """Whether there is a file that runs and gives the model's, or the simulation's, outputs."""
    found = row[kind]
    return "failure" not in found and found["decibels"] >= LEAST_DB[kind]


def verdict(row: Row, kind: str) -> str:
    """Whether preflight was right."""
    refused = bool(row[kind]["problems"])
    if works(row, kind):
        return "false alarm" if refused else "hit"
    return "refused" if refused else "miss"


def said(row: Row, kind: str) -> str:
    """What there is to say of one network on one target, in few words."""
    found = row[kind]
    if found["problems"]:
        return f"refused: {found['problems'][0]}"
    return str(found.get("failure") or f"{found['decibels']:.0f} dB")


def preflights(rows: list[Row], runtimes: list[str]) -> str:
    """How often preflight was right on each target, where it was not, and what it refused."""
    lines = [
        "| target | networks | float: compiled as foretold | refused, rightly | wrongly |"
        " int8: compiled as foretold | refused, rightly | wrongly |"
        " layers promised in int8 | computed in int8 | preflight, s |",
        f"| --- |{' ---: |' * 10}",
    ]
    wrong = []
    for runtime in runtimes:
        mine = [r for r in rows if r["backend"] == runtime and "failure" not in r]
        cells = [runtime, str(len(mine))]
        for kind in ("float", "int8"):
            found = [verdict(r, kind) for r in mine]
            bad = found.count("miss") + found.count("false alarm")
            cells += [str(found.count("hit")), str(found.count("refused")), str(bad)]
        filed = [r["int8"] for r in mine if verdict(r, "int8") == "hit"]
        integer = sum(min(r["layers"], r["promised"]) for r in filed)
        cells += [f"{sum(r['promised'] for r in filed):,}"]
        cells += ["not told" if runtime == "tensorrt" else f"{integer:,}"]
        seconds = sorted(r["preflight_s"] for r in mine)
        cells += [f"{seconds[len(seconds) // 2]:.0f}" if seconds else ""]
        lines.append(f"| {' | '.join(cells)} |")
        for r in rows:
            if r["backend"] != runtime:
                continue
            if "failure" in r:
                wrong.append(f"- {r['name']}, {runtime}: not tried: {cell(r['failure'], 240)}")
                continue
            how = {kind: verdict(r, kind) for kind in ("float", "int8")}
            if set(how.values()) == {"refused"}:
                wrong.append(f"- {r['name']}, {runtime}: {said(r, 'float')}")
                continue
            for kind in ("float", "int8"):
                if how[kind] != "hit":
                    wrong.append(f"- {r['name']}, {runtime}, {kind}: {_mark(how[kind], r, kind)}")
            found = r["int8"]
            less = found.get("layers", 0) < found.get("promised", 0)
            if less and runtime != "tensorrt" and how["int8"] == "hit":
                wrong.append(
                    f"- {r['name']}, {runtime}: {found['promised']} layers promised in int8, "
                    f"{found['layers']} in the file"
                )
    return "\n".join([*lines, "", *(wrong or ["Nothing was foretold wrongly."]), ""])


def _mark(how: str, row: Row, kind: str) -> str:
    return said(row, kind) if how == "refused" else f"{how}: {said(row, kind)}"


def files(rows: list[Row], runtimes: list[str]) -> str:
    """Agreement, latency, size and memory of each network's files on each target."""
    lines = [
        "| network | target | dB, float | int8 | agrees | metric, float | int8 | ms, float | int8 |"
        " ratio | KiB, float | int8 | MiB, float | int8 |",
        f"| --- | --- |{' ---: |' * 12}",
    ]
    for row in rows:
        if row["backend"] not in runtimes:
            continue
        head = f"| {row['name']} | {row['backend']} |"
        if "failure" in row:
            lines.append(f"{head} {cell(row['failure'])} |")
            continue
        both = [row[kind] for kind in ("float", "int8")]
        refusals = [said(row, kind) for kind in ("float", "int8") if not works(row, kind)]
        if len(refusals) == 2:
            lines.append(f"{head} {cell(refusals[0], 240)} |")
            continue
        cells = [_figure(found.get("decibels"), ".0f") for found in both]
        cells.append(_figure(both[1].get("agrees"), ".2%"))
        for key, form in (("metric", ".4f"), ("ms", ".2f"), ("kib", ",.0f"), ("mib", ".1f")):
            pair = [found.get(key) for found in both]
            cells += [_figure(value, form) for value in pair]
            if key == "ms":
                cells.append(_figure(pair[1] / pair[0] if all(pair) else None, ".2f"))
        lines.append(f"{head} {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main() -> None:
    """Run what is not yet in the results, then write results.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--backends", default=",".join(RUNTIMES))
    parser.add_argument(
        "--python", action="append", default=[], metavar="BACKEND=PATH",
        help="interpreter of a backend that lies in an environment of its own",
    )  # fmt: skip
    parser.add_argument("--data", help="the data folder, for the pretrained networks")
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one process")
    parser.add_argument("--seconds", type=float, default=0.5, help="to measure a file for")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    given = parser.parse_args()
    runtimes = given.backends.split(",")
    pythons = dict(entry.split("=", 1) for entry in given.python)
    zoo = [(library, name) for library, name in architectures() if name not in HEAVY]
    wanted = [("data", name) for name in PRETRAINED if given.data]
    wanted += sorted(zoo, key=lambda one: one[1] not in MEASURED)
    wanted = [a for a in wanted if not given.only or a[1] in given.only.split(",")]
    rows = kept(given.output)
    done = {(row["name"], row["backend"]) for row in rows}

    def make(library: str, name: str, runtime: str) -> Row:
        measured = library == "data" or name in MEASURED
        arguments = [library, name, runtime, "--seconds", str(given.seconds if measured else 0)]
        arguments += ["--data", given.data] if given.data else []
        row = {"library": library, "name": name, "backend": runtime}
        python = pythons.get(runtime, sys.executable)
        return row_of("targets_one.py", arguments, row, given.limit, python)

    every = [(*a, runtime) for a in wanted for runtime in runtimes]
    missing = [one for one in every if one[1:] not in done]
    missing.sort(key=lambda one: one[0] != "data" and one[1] not in MEASURED and one[2] in SLOW)
    with ThreadPoolExecutor(given.jobs) as pool:
        running = [pool.submit(make, *one) for one in missing]
        for done_one in track(as_completed(running), "compiling", total=len(running)):
            keep_(given.output, rows, done_one.result())
    order = {one[1:]: n for n, one in enumerate(every)}
    rows = [row for row in rows if (row["name"], row["backend"]) in order]
    rows.sort(key=lambda row: order[row["name"], row["backend"]])
    table = "\n".join([
        f"({machine('torch', 'torchvision', 'timm', *RUNTIMES, 'ai-edge-litert')})", "",
        preflights([row for row in rows if row["library"] != "data"], runtimes),
        files([r for r in rows if r["library"] == "data" or r["name"] in MEASURED], runtimes),
    ])  # fmt: skip
    (given.output / "results.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
