"""Rewrites one architecture in a process of its own and prints what came out as JSON.

python benchmarks/zoo/rewritten_one.py timm tresnet_m

Outputs are compared here, in float32 on other inputs than slimkit verifies with.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from one import build, outputs

import slimkit
from slimkit.rewriting.known import REWRITES


def main() -> None:
    """Try every rewrite by itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=["torchvision", "timm"])
    parser.add_argument("name")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, x = build(given.library, given.name)
    torch.manual_seed(1)
    other = torch.randn_like(x)
    before = outputs(model, other)
    rows: dict[str, Any] = {}
    for known in REWRITES.values():
        try:
            fast = slimkit.rewrite(model, x, known.name)
        except slimkit.SlimkitError as error:
            rows[known.name] = {"refused": str(error)}
            continue
        pairs = list(zip(before, outputs(fast, other), strict=True))
        off = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
        done = fast.slimkit_rewriting.done[-1]
        rows[known.name] = {
            "exact": known.exact,
            "places": done.places,
            "left": len(done.left),
            "off": off,
            "cost": done.cost,
        }
    print(json.dumps({"name": given.name, "rewrites": rows}))


if __name__ == "__main__":
    main()
