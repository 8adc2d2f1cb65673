"""Suites of cases, and the ratios that they are for. To add one write a function and enter it in SUITES."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from catmaps.benchmarks.case import Case
from catmaps.errors import UserError

OFFICIAL = {"base": 499.0, "ecld": 114.0, "sample": 312.0}
"""Tokens/s of the official text code at V = 50,257 and the default shape of `Case`, on 2 cores whose matrix peak was
880 (bf16) and 200 (fp32) GFLOP/s; sampling is the middle of 280 to 345."""
OFFICIAL_SMALL = {"base": 6585.0, "sample": 5100.0}
"""The same at V = 27, L = 256, B = 16."""
OFFICIAL_PEAK = 200e9  # fp32, which that code computes in
SMALL = {"vocabulary": 27, "length": 256, "batch": 16}


@dataclass(frozen=True)
class Ratio:
    """How much better one row is than another: in time, in memory above idle, or in a share of the matrix peak."""

    name: str
    value: float
    bar: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.bar if self.at_least else self.value <= self.bar


Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Suite:
    cases: dict[str, Case]
    ratios: Callable[[Rows], list[Ratio]]
    axis: str | None = None
    """Field of a case to plot over."""


def _seconds(row: dict[str, Any]) -> float:
    return statistics.median(row["seconds"])


def _faster(name: str, rows: Rows, slow: str, fast: str, bar: float) -> Ratio:
    return Ratio(name, _seconds(rows[slow]) / _seconds(rows[fast]), bar)


def _memory(name: str, rows: Rows, big: str, small: str, bar: float) -> Ratio:
    return Ratio(name, rows[small]["peak_bytes"] / max(1, rows[big]["peak_bytes"]), bar, at_least=False)


def step() -> Suite:
    """A base step at V = 50,257 against the dense reference, and at V = 27."""
    base = Case(work="base")
    cases = {
        "dense": replace(base, code="dense", precision="fp32"),
        "linear": base,
        "belief": replace(base, input="belief"),
        "dense, V = 27": replace(base, code="dense", precision="fp32", **SMALL),
        "belief, V = 27": replace(base, input="belief", **SMALL),
    }

    def ratios(rows: Rows) -> list[Ratio]:
        return [
            _faster("base step, linear against dense: times faster", rows, "dense", "linear", 4.0),
            _memory("the same: share of its peak memory", rows, "dense", "linear", 1 / 3),
            Ratio("belief: times linear's step", _seconds(rows["belief"]) / _seconds(rows["linear"]), 3.0, False),
            _memory("belief: share of dense's peak memory", rows, "dense", "belief", 1 / 3),
            _faster("V = 27, belief against dense: times faster", rows, "dense, V = 27", "belief, V = 27", 2.5),
        ]

    return Suite(cases, ratios)


def distill() -> Suite:
    """Distillation steps at V = 50,257 against ECLD of the dense reference."""
    plain = Case(work="psd")
    cases = {"dense ecld": replace(plain, work="ecld", code="dense", precision="fp32", repeats=3)}
    cases |= {f"{name}, linear": replace(plain, work=name) for name in ("psd", "soft", "anchor", "lsd", "esd", "ecld")}
    cases["psd, belief"] = replace(plain, input="belief")

    def ratios(rows: Rows) -> list[Ratio]:
        return [
            _faster("psd step against dense ecld: times faster", rows, "dense ecld", "psd, linear", 8.0),
            _memory("the same: share of its peak memory", rows, "dense ecld", "psd, linear", 1 / 4),
        ]

    return Suite(cases, ratios)


def sample() -> Suite:
    """Four calls of the map against the dense reference."""
    plain = Case(work="sample")
    cases = {
        "dense": replace(plain, code="dense", precision="fp32"),
        "linear": plain,
        "belief": replace(plain, input="belief"),
        "linear, one text": replace(plain, batch=1),
        "dense, V = 27": replace(plain, code="dense", precision="fp32", **SMALL),
        "belief, V = 27": replace(plain, input="belief", **SMALL),
    }

    def ratios(rows: Rows) -> list[Ratio]:
        return [
            _faster("4-call samples, linear against dense: times faster", rows, "dense", "linear", 8.0),
            _faster("V = 27, belief against dense: times faster", rows, "dense, V = 27", "belief, V = 27", 2.5),
        ]

    return Suite(cases, ratios)


def score() -> Suite:
    """The likelihood bound against the dense reference."""
    plain = Case(work="score")
    cases = {
        "dense": replace(plain, code="dense", precision="fp32"),
        "linear": plain,
        "belief": replace(plain, input="belief"),
    }
    return Suite(cases, lambda rows: [_faster("bound, linear: times faster", rows, "dense", "linear", 1.0)])


def vocab() -> Suite:
    """Memory over the vocabulary at one size of a tile: flat but for weights' gradients, which are counted apart."""
    sizes = (1_000, 10_000, 50_257, 100_000, 200_000)
    cases = {f"V = {v}": Case(work="sample", vocabulary=v, tile_megabytes=4, compile=False) for v in sizes}
    cases |= {
        f"base, V = {v}": Case(work="base", vocabulary=v, tile_megabytes=4, width=64, heads=2, compile=False)
        for v in sizes
    }

    def ratios(rows: Rows) -> list[Ratio]:
        *smaller, largest = (rows[f"V = {v}"]["peak_bytes"] for v in sizes)
        name = "sampling, the largest V against the most of smaller ones: times the memory above idle"
        return [Ratio(name, largest / max(smaller), 1.5, False)]

    return Suite(cases, ratios, "vocabulary")


def length() -> Suite:
    """Tokens/s over the length at 4,096 tokens a step, V = 27."""
    cases = {
        f"L = {n}": Case(work="base", input="belief", vocabulary=27, length=n, batch=4096 // n)
        for n in (64, 128, 256, 512, 1024)
    }
    return Suite(cases, lambda rows: [], "length")


def batch() -> Suite:
    """Tokens/s over the texts of a step."""
    plain = Case(work="base", compile=False, repeats=3)
    cases = {f"B = {n}": replace(plain, batch=n) for n in (1, 4, 16)}
    cases |= {f"V = 27, B = {n}": replace(plain, input="belief", vocabulary=27, batch=n) for n in (1, 4, 16, 64)}
    return Suite(cases, lambda rows: [], "batch")


def width() -> Suite:
    """The share of the matrix-product peak at a width that a study would use, and tokens/s over the width."""
    wide = Case(work="base", width=512, blocks=8, heads=8, length=512, batch=4, repeats=3)
    cases = {
        "V = 27": replace(wide, input="belief", vocabulary=27),
        "V = 50257": replace(wide, input="linear", vocabulary=50_257),
    }
    over = replace(wide, input="belief", vocabulary=27, length=128, batch=16, blocks=4, compile=False)
    cases |= {f"V = 27, d = {d}": replace(over, width=d, heads=d // 64) for d in (128, 256, 512, 1024)}

    def ratios(rows: Rows) -> list[Ratio]:
        shares = {name: rows[name]["peak_share"] for name in ("V = 27", "V = 50257")}
        return [Ratio(f"{name}: share of the bf16 peak", share, 0.4) for name, share in shares.items()]

    return Suite(cases, ratios, "width")


SUITES: dict[str, Callable[[], Suite]] = {
    f.__name__: f for f in (step, distill, sample, score, vocab, length, batch, width)
}


def in_process(given: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a new process."""
    command = [sys.executable, "-m", "catmaps.benchmarks.case", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the case {given} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(suite: Suite, threads: int, rounds: int, **options: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures all cases `rounds` times in turn, so that what else the machine does meets all of them alike.

    Yields (name, row) as rows are complete, in the last round; a row has the seconds of all rounds, the largest memory
    and the share of the matrix peak that was measured beside it. `options` are fields of all cases.
    """
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in suite.cases}
    for turn in range(rounds):
        for name, case in suite.cases.items():
            case = replace(case, threads=threads, **options)
            peak = in_process({"work": "peak", "threads": threads, "clock": case.clock})
            row = in_process(asdict(case))
            parts[name].append(row | {"machine_peak": peak})
            if turn == rounds - 1:
                yield name, _joined(parts[name])


def profiles(suite: Suite, threads: int) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, seconds by kind of work) of all cases of this package's code (`profile.profile`)."""
    for name, case in suite.cases.items():
        if case.code == "catmaps":
            yield name, in_process({"profile": asdict(replace(case, threads=threads))})


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [s for part in parts for s in part["seconds"]]
    median, row = statistics.median(seconds), parts[0]
    peaks = {name: max(part["machine_peak"][name] for part in parts) for name in ("bf16", "fp32")}
    return row | {
        "seconds": seconds,
        "median_seconds": median,
        "spread": (max(seconds) - min(seconds)) / median,
        "peak_bytes": max(part["peak_bytes"] for part in parts),
        "tokens_per_second": row["tokens"] / median,
        "machine_peak": peaks,
        "peak_share": row["flops"] / median / peaks[row["precision"]],
    }


def official_ratio(row: dict[str, Any]) -> float | None:
    """Tokens/s against the official code's, scaled by the fp32 matrix peaks of the two machines; None: not known."""
    shape = (row["vocabulary"], row["length"], row["batch"], row["width"], row["blocks"])
    figures = {(50_257, 128, 8, 256, 4): OFFICIAL, (27, 256, 16, 256, 4): OFFICIAL_SMALL}.get(shape, {})
    if row["work"] not in figures:
        return None
    return row["tokens_per_second"] / (figures[row["work"]] * row["machine_peak"]["fp32"] / OFFICIAL_PEAK)
