"""Where the time of a case goes: its operations, sorted into kinds of work by torch's profiler."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config

from catmaps.benchmarks.case import Case, prepared
from catmaps.tiles import TILE
from catmaps.weights import AT_ONCE

REPEATS = 2
WIDE, NARROW, BLOCKS, COPIES, REST = (
    "products of width V",
    "products of blocks",
    "kernels of blocks; backward, of tiles",
    "sums, copies, casts",
    "the rest",
)
KERNELS = {
    "_normals": "noise",
    "_belief": "beliefs",
    "_exponentials": "cross-entropy",
    "_scaled": "cross-entropy",
    "_softmax": "endpoints",
    "_unnormalised": "endpoints",
    "_argmax": "endpoints",
    "_log_softmax": "endpoints",
}
"""What tiles' kernels are for; others are losses."""
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
MOVES = ("aten::copy_", "aten::add_", "aten::fill_", "aten::zero_", "aten::mul_", "aten::cat", "aten::index_add_")


def profile(case: Case) -> dict[str, float]:
    """Seconds of a repeat by kind of work, largest first. Profiling slows small operations: read shares."""
    config.cpp.enable_kernel_profile = True  # names the kernels
    repeat = prepared(case)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        for _ in range(REPEATS):
            repeat()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    piece = min(case.vocabulary, AT_ONCE // case.width)
    wide = {case.vocabulary, piece, case.vocabulary % piece}
    total: dict[str, float] = defaultdict(float)
    for event, parents in _nested(events):
        total[_kind(event, parents, wide)] += event["own"] / REPEATS / 1e6
    return dict(sorted(total.items(), key=lambda pair: -pair[1]))


def _nested(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Operations with their own time, without that of others inside, and what they lie in."""
    found = [e | {"own": e["dur"]} for e in events if e.get("cat") in ("cpu_op", "user_annotation")]
    found.sort(key=lambda e: (e["tid"], e["ts"], -e["dur"]))
    stack: list[dict[str, Any]] = []
    placed = []
    for event in found:
        while stack and (stack[-1]["tid"] != event["tid"] or stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]):
            stack.pop()
        if stack:
            stack[-1]["own"] -= event["dur"]
        placed.append((event, list(stack)))
        stack.append(event)
    yield from placed


def _kind(event: dict[str, Any], parents: list[dict[str, Any]], wide: set[int]) -> str:
    name = event["name"]
    if name in PRODUCTS:
        sizes = {size for shape in event["args"].get("Input Dims", []) for size in shape if isinstance(size, int)}
        return WIDE if sizes & wide else NARROW
    if name.startswith("graph_"):
        tiles = [p["name"].removeprefix(TILE) for p in parents if p["name"].startswith(TILE)]
        return KERNELS.get(tiles[-1], "losses") if tiles else BLOCKS
    if name.startswith("aten::_fused_adam"):
        return "AdamW"
    return COPIES if name in MOVES else REST
