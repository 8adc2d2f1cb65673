"""Gathers what a report shows of a run: curves, the bound, samples at several numbers of calls and their quality."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from catmaps.evaluation.judge import LETTERS, Judge, JudgeConfig
from catmaps.evaluation.quality import Quality, control_rows, draw_chunks, evenly, quality
from catmaps.evaluation.report import CallsRow, ClockBin, CurvePoint, NelboPoint, ReportData, TrajectoryRow
from catmaps.flow.flow_map import positionwise
from catmaps.flow.interpolant import interpolate
from catmaps.flow.likelihood import squared_error
from catmaps.generation import SamplingConfig, default_sampling, generate, generate_texts
from catmaps.model import METRICS, Run
from catmaps.scoring import Score, score
from catmaps.text.manifest import MANIFEST_FILE
from catmaps.text.shards import load_boundaries, load_tokens, sequences
from catmaps.text.tokenizers import HuggingFaceTokenizer, Tokenizer, load, save, train_bpe

RETOKENISER_VOCABULARY = 4096


def documents(shards: Path, tokenizer: Tokenizer, split: str) -> list[str]:
    """The normalised text of a split's documents."""
    ids, starts = load_tokens(shards, split), load_boundaries(shards, split).astype(np.int64)
    return [tokenizer.decode(part).strip() for part in np.split(ids, starts[1:])]


def build_judge(shards: Path, tokenizer: Tokenizer, cache: Path) -> Judge:
    """The judge of a corpus, kept in `cache` after the first time: n-gram model, words and BPE of its training text."""
    key = hashlib.sha256((shards / MANIFEST_FILE).read_bytes()).hexdigest()[:12]
    folder = cache / f"judge-{key}"
    if (folder / "judge.json").exists():
        retokeniser = load(folder)
        return Judge.load(folder, retokeniser)
    train = documents(shards, tokenizer, "train")
    retokeniser = train_bpe(train, RETOKENISER_VOCABULARY)
    assert isinstance(retokeniser, HuggingFaceTokenizer)
    alphabet = LETTERS if tokenizer.name == "text8" else None
    judge = Judge.build(train, documents(shards, tokenizer, "test"), retokeniser, JudgeConfig(alphabet=alphabet))
    folder.mkdir(parents=True, exist_ok=True)
    save(retokeniser, folder)
    judge.save(folder)
    return judge


def read_metrics(run: Run) -> list[dict[str, float | int]]:
    file = run.path / METRICS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@torch.inference_mode()
def clock_bins(run: Run, tokens: torch.Tensor, bins: int = 24) -> list[ClockBin]:
    """Cross-entropy and squared error of the diagonal over the run's clock, on held-out text."""
    flow_map, generator, rows = run.flow_map, run.generator(0), []
    tokens = tokens.to(run.device)
    for i in range(bins):
        tau = (i + 0.5) / bins
        t = torch.full(
            (len(tokens), 1), run.law.quantile(torch.tensor(tau, dtype=torch.float64)).item(), device=run.device
        )
        noise = flow_map.random_noise(tokens.shape, generator)
        endpoint = flow_map.read(interpolate(tokens, noise, t), t, t)
        ce = positionwise(endpoint, lambda log_mu, tile: -log_mu.gather(-1, tile(tokens)[..., None])[..., 0])
        square = positionwise(endpoint, lambda log_mu, tile: squared_error(log_mu, tile(tokens)))
        rows.append(ClockBin(tau, ce.mean().item(), square.mean().item()))
    return rows


def trajectory(run: Run, steps: int = 16, seed: int = 0, sampler: str | None = None) -> list[TrajectoryRow]:
    """One text on its way: after every step the likeliest tokens of the endpoint and their probabilities."""
    rows: list[TrajectoryRow] = []
    strings = run.tokenizer.token_strings()

    def watch(t: float, endpoint: torch.Tensor) -> None:
        best = endpoint[0].max(-1)
        rows.append(
            TrajectoryRow(f"t = {t:.2f}", [strings[i] for i in best.indices.tolist()], best.values.clamp(0, 1).tolist())
        )

    sampler = sampler or default_sampling(run).sampler
    for _ in generate(run, 1, SamplingConfig(steps=steps, sampler=sampler, seed=seed), watch=watch):
        pass
    return rows


def heldout_score(run: Run, shards: Path, windows: int, num_samples: int = 16) -> Score:
    """The bound on randomly chosen windows of the test split."""
    available = len(sequences(shards, "test", run.config.data.length))
    tokens = sequences(shards, "test", run.config.data.length, count=min(windows, available), seed=0)
    return score(run, torch.from_numpy(tokens), num_samples=num_samples)


def long_texts(run: Run, judge: Judge, config: SamplingConfig, num: int) -> list[str]:
    """Texts of the judge's `min_chars` characters each, written block by block."""
    wanted = judge.config.min_chars
    share = run.config.data.length / judge_length(run, judge)  # tokens per character
    tokens = wanted if run.tokenizer.name == "text8" else math.ceil(1.25 * share * wanted)
    texts = generate_texts(run, num, config, length=tokens)
    while short := [i for i, text in enumerate(texts) if len(text) < wanted]:  # tokens of few characters
        longer = generate_texts(run, num, config, length=(tokens := 2 * tokens))
        texts = [longer[i] if i in short else text for i, text in enumerate(texts)]
    return [text[:wanted] for text in texts]


def measure(run: Run, judge: Judge, sampling: SamplingConfig, num: int) -> tuple[Quality, list[str]]:
    """The quality of samples, and these."""
    samples = generate_texts(run, num, sampling)
    return quality(samples, judge), samples


SHARE = 0.75  # samples of one call have had 0.80 of the characters of real texts


def apart(run: Run, judge: Judge, num: int) -> Judge:
    """The judge for rows of `num` samples that are measured one by one, where `evenly` cannot see them all.

    As many tokens hold more or fewer characters, by a fifth in samples of few calls: reverse models are fitted to three
    quarters of the characters that as many real texts have. Letters are equally many anyhow: nothing changes.
    """
    if run.tokenizer.name == "text8":
        return judge
    return evenly(judge, (), round(SHARE * num * judge_length(run, judge)))


EULER = "base, Euler"


def series(run: Run) -> str:
    """What a report calls the rows of a run."""
    return run.kind if run.baseline is not None else "map" if run.is_map else EULER


def row_name(of: str, calls: int) -> str:
    """The name of a row of a series."""
    return f"{of}, {calls} calls"


def report_rows(run: Run, base: Run | None, calls: tuple[int, ...]) -> list[tuple[str, Run, int]]:
    """The rows of samples of a report: series, whose they are, and calls, as near to `calls` as its sampler comes."""
    runs = [(series(run), run)] + ([] if base is None else [(EULER, base)])
    return [(name, one, n) for name, one in runs for n in dict.fromkeys(default_sampling(one, n).calls for n in calls)]


def collect(
    run: Run,
    base: Run | None,
    shards: Path,
    cache: Path,
    *,
    num: int,
    num_texts: int,
    windows: int,
    calls: tuple[int, ...],
    drawn_row: Callable[[str], None] = lambda name: None,
) -> tuple[ReportData, Score]:
    """Everything for a report of a run and, beside a map, of its base.

    Args:
        run: Base or map.
        base: A map's base; its rows come from Euler steps.
        shards: The corpus, whose held-out text is the reference.
        cache: Where the judge is kept.
        num: Samples per row.
        num_texts: Long texts per row.
        windows: Windows of test text for the bound.
        calls: Numbers of network calls.
        drawn_row: Told the name of each row of samples once it is drawn, which takes nearly all of the time.
    """
    judge, rng = build_judge(shards, run.tokenizer, cache), np.random.default_rng(0)
    length, drawn, own = judge_length(run, judge), {}, series(run)
    for name, one, n in report_rows(run, base, calls):
        sampling = default_sampling(one, n)
        drawn[name, n] = generate_texts(one, num, sampling), long_texts(one, judge, sampling, num_texts)
        drawn_row(row_name(name, n))
    judge = evenly(judge, (samples for samples, _ in drawn.values()), num * length)
    rows = [CallsRow(name, n, quality(samples, judge, texts)) for (name, n), (samples, texts) in drawn.items()]
    metrics, bound = read_metrics(run), heldout_score(run, shards, windows)
    controls = control_rows(judge, length, num, rng, num_texts)
    data = ReportData(
        run_name=run.path.name,
        summary=f"{run.kind}, {run.tokenizer.name}, {run.config.data.length} tokens",
        figures=_figures(run, bound, metrics),
        config=_flatten(asdict(run.config)),
        curve=[CurvePoint(int(row["step"]), row["loss"]) for row in metrics if "loss" in row],
        clock=[] if run.baseline is not None else clock_bins(run, _some(run, shards)),
        nelbo=[
            NelboPoint(int(row["step"]), row["nelbo_bits_per_char"], row["nelbo_stderr"])
            for row in metrics
            if "nelbo_bits_per_char" in row
        ],
        rows=rows,
        controls=controls,
        reference=controls["held-out text"],
        samples={n: samples[:3] for (name, n), (samples, _) in drawn.items() if name == own},
        real_samples=draw_chunks(judge.drawn, length, 3, rng),
        trajectory=[] if run.baseline is not None else trajectory(run),
    )
    return data, bound


def _some(run: Run, shards: Path) -> torch.Tensor:
    return torch.from_numpy(sequences(shards, "test", run.config.data.length, count=64, seed=1))


def judge_length(run: Run, judge: Judge) -> int:
    """Characters of a text as long as the run's: its tokens times the corpus' characters per token."""
    if run.tokenizer.name == "text8":
        return run.config.data.length
    some = judge.drawn[:20_000]
    return max(1, round(run.config.data.length * len(some) / len(run.tokenizer.encode(some))))


def _figures(run: Run, bound: Score, metrics: list[dict[str, float | int]]) -> list[tuple[str, str]]:
    scale = 1 / (math.log(2) * bound.characters)
    body, vocabulary = run.network.num_parameters()
    seconds = max((row["seconds"] for row in metrics), default=0.0)
    return [
        (
            "test NELBO, bits/char (upper bound)",
            f"{bound.nats * scale:.3f} ± {bound.windows_stderr * scale:.3f}",
        ),
        ("parameters", f"{body / 1e6:.2f}M + {vocabulary / 1e6:.2f}M vocabulary"),
        ("training time", f"{seconds / 60:.1f} min"),
        ("tokens seen", f"{max((row['tokens'] for row in metrics), default=0) / 1e6:.1f}M"),
    ]


def _flatten(values: dict[str, object], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        rows += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, str(value))]
    return rows
