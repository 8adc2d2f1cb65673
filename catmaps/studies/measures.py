"""What is measured of an arm. To add a measure, write a function here and enter it in MEASURES.

A measure is a function (run, *, seed, ...) -> Measured. Its other keyword parameters have defaults, which study.json
may set: {"name": "nelbo", "windows": 512}. The first figure of a study's first measure ranks its arms.
"""

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import Bool
from torch import Tensor

from catmaps.errors import UserError
from catmaps.evaluation.collect import apart, build_judge, heldout_score, read_metrics
from catmaps.evaluation.collect import measure as sample_quality
from catmaps.generation import default_sampling
from catmaps.model import BINS, Run
from catmaps.scoring import bound_given
from catmaps.text.shards import sequences


@dataclass(frozen=True)
class Figure:
    """A number, its standard error from finite draws or windows (NaN: not known), and which way is better."""

    value: float
    stderr: float = math.nan
    better: str = "lower"
    """lower, higher, or neither."""


@dataclass(frozen=True)
class Curve:
    """Points (x, y) to be plotted, and their axes' names."""

    x: str
    y: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Measured:
    """Figures and curves by name."""

    figures: dict[str, Figure] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)


def nelbo(run: Run, *, seed: int, windows: int = 256) -> Measured:
    """The bound on windows of the test split, bits per character; the same windows and draws for every arm."""
    from catmaps.training.train import find_shards

    del seed
    score = heldout_score(run, find_shards(run.config), windows)
    scale = 1 / math.log(2) / score.characters
    return Measured({"nelbo": Figure(score.nats * scale, score.windows_stderr * scale)})


def _halves(rows: int, length: int, seed: int) -> dict[str, Bool[Tensor, "{rows} {length}"]]:
    """Known positions, half of each window: a prefix, both ends, and scattered ones that differ by window."""
    position, half = torch.arange(length).expand(rows, length), length // 2
    scattered = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)).argsort(1) < half
    inner = (position >= half // 2) & (position < half // 2 + length - half)
    return {"prefix": position < half, "both ends": ~inner, "scattered": scattered}


def given(run: Run, *, seed: int, windows: int = 256, samples: int = 16) -> Measured:
    """Bounds on halves of windows given the other half clean, bits per token: what prompts and blanks feel.

    The same windows, halves and draws for every arm.
    """
    from catmaps.training.train import find_shards

    del seed
    shards, length = find_shards(run.config), run.config.data.length
    available = len(sequences(shards, "test", length))
    tokens = torch.from_numpy(sequences(shards, "test", length, count=min(windows, available), seed=0))
    figures: dict[str, Figure] = {}
    for name, known in _halves(*tokens.shape, seed=0).items():
        rows = [
            bound_given(run, part, mask, num_samples=samples).nats
            for part, mask in zip(tokens.split(64), known.split(64), strict=True)
        ]
        bits = torch.cat(rows).cpu() / (~known).sum(1) / math.log(2)
        figures[f"given {name}"] = Figure(bits.mean().item(), bits.std().item() / math.sqrt(len(bits)))
    return Measured(figures)


def few_step(
    run: Run, *, seed: int, calls: tuple[int, ...] = (1, 2, 4, 8), samples: int = 256, noise: float = 1.0
) -> Measured:
    """Samples in few calls: forward and reverse bits, token entropy, distinct-2 (docs/log.md).

    Maps renoise by eq. (13), not with less of its noise as `catmaps sample` does, unless `noise` says so: figures of a
    study compare with those that it has.

    The latter two have no better direction: they belong beside held-out text. Families that make one call per token
    have figures at that number alone.
    """
    from catmaps.training.train import cache_folder, find_shards

    cache_folder().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_folder() / ".judge.lock"):  # made once, not by every process
        judge = apart(run, build_judge(find_shards(run.config), run.tokenizer, cache_folder()), samples)
    figures: dict[str, Figure] = {}
    forward, reverse = (Curve("network calls", f"{way} bits per character", []) for way in ("forward", "reverse"))
    for n in dict.fromkeys(default_sampling(run, n).calls for n in calls):
        sampling = replace(default_sampling(run, n), seed=seed)
        sampling = replace(sampling, noise=noise) if sampling.sampler == "renoise" else sampling
        row, _ = sample_quality(run, judge, sampling, samples)
        figures |= {
            f"forward bits @{n}": Figure(row.forward_bits, row.forward_stderr),
            f"reverse bits @{n}": Figure(row.reverse_bits),
            f"entropy @{n}": Figure(row.token_entropy, row.token_entropy_stderr, "neither"),
            f"distinct-2 @{n}": Figure(row.distinct_2, row.distinct_2_stderr, "neither"),
        }
        forward.points.append((float(n), row.forward_bits))
        reverse.points.append((float(n), row.reverse_bits))
    return Measured(figures, {"forward bits over calls": forward, "reverse bits over calls": reverse})


def curve(run: Run, *, seed: int) -> Measured:
    """Validation during training: the last bound, and all of them over tokens."""
    del seed
    rows = [row for row in read_metrics(run) if "nelbo_bits_per_char" in row]
    if not rows:
        raise UserError(f"run {run.path} was never validated: the measure curve needs training.evaluate_every above 0")
    last = Figure(rows[-1]["nelbo_bits_per_char"], rows[-1]["nelbo_stderr"])
    points = [(float(row["tokens"]), float(row["nelbo_bits_per_char"])) for row in rows]
    return Measured({"validation": last}, {"validation": Curve("tokens", "bits per character (bound)", points)})


BIN_FIGURES = {
    "loss": "nats per token",
    "squared_error": "squared error",
    "entropy": "entropy (nats)",
    "largest_logit": "largest logit",
    "gradient_norm": "gradient norm",
}


def bins(run: Run, *, seed: int) -> Measured:
    """The last line of bins.jsonl: figures over the clock at the end of training. Of flows only."""
    del seed
    file = run.path / BINS
    if not file.exists():
        return Measured()
    row = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
    return Measured(
        {},
        {
            f"{name.replace('_', ' ')} over the clock": Curve("t", label, list(zip(row["t"], row[name], strict=True)))
            for name, label in BIN_FIGURES.items()
            if None not in row[name]  # gradients where processes shared the network
        },
    )


MEASURES: dict[str, Callable[..., Measured]] = {
    "nelbo": nelbo,
    "given": given,
    "few_step": few_step,
    "curve": curve,
    "bins": bins,
}


def checked(value: Any) -> tuple[str, dict[str, Any]]:
    """A measure of study.json, a name or an object with one, as name and options; ValueError if there is none such."""
    named = {"name": value} if isinstance(value, str) else value
    if not isinstance(named, dict) or named.get("name") not in MEASURES:
        raise ValueError(f"there is no measure {json.dumps(value)}; there are {', '.join(MEASURES)}")
    name, options = named["name"], {key: option for key, option in named.items() if key != "name"}
    known = {p.name: p.default for p in inspect.signature(MEASURES[name]).parameters.values()}
    known = {key: default for key, default in known.items() if default is not inspect.Parameter.empty}
    for key, option in options.items():
        if key not in known or not _alike(option, known[key]):
            raise ValueError(f"measure {name} takes {_spoken(known)}, not {key} {json.dumps(option)}")
    return name, {key: tuple(o) if isinstance(o, list) else o for key, o in options.items()}


def _alike(option: Any, default: Any) -> bool:
    """Whether JSON's value can stand for a default: lists for tuples, and what is in them."""
    if isinstance(default, tuple):
        return isinstance(option, list) and len(option) > 0 and all(_alike(item, default[0]) for item in option)
    return type(option) is type(default)


def _spoken(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} (as {json.dumps(default)})" for name, default in options.items()) or "no options"


def measured(run: Run, name: str, options: dict[str, Any], seed: int) -> Measured:
    """Applies a measure of study.json."""
    return MEASURES[name](run, seed=seed, **options)
