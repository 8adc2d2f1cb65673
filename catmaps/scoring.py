"""How likely a run's base flow finds texts: bounds in windows.

Every bound here scores the diagonal mu_{t,t} of a run, a map's as well as a base's. No tight bound of the few-step
push-forward is known to us, and none is claimed. All are conditioned on the length of each window.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor
from torch.distributed.tensor import DTensor

from catmaps.errors import UserError
from catmaps.flow.finite_step import finite_step_bound, optimise_grid
from catmaps.flow.likelihood import (
    Bound,
    Integrand,
    capped_cross_entropy,
    nelbo,
    pilot,
    projected_error,
    squared_error,
)
from catmaps.flow.times import Law, grid, mixture
from catmaps.model import Run, compile_blocks
from catmaps.network.tokens import Flow
from catmaps.scores import KEYS, Score, TextScore, pool

PILOT_WINDOWS = 32


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Which bound, and how it is estimated."""

    bound: Literal["nelbo", "cross-entropy", "finite-step"] = "nelbo"
    """(14), (15) or (16)."""
    samples: int | None = None
    """Draws per window, at least 2. None: 16, or of every one of N finite steps max(2, 16/N)."""
    steps: int | None = None
    """Finite steps N, network calls of the sampler whose texts are bounded."""
    times: tuple[float, ...] | None = None
    """Their grid 0 = t_0 < ... < t_N = 1; None: equally spaced on the run's clock."""
    t_max: float = 0.9
    """Where (14) and (15) are cut; beyond it stands the cross-entropy there."""
    pilot: bool = False
    """Measure a law of time for these texts first, instead of the run's."""
    seed: int = 0
    batch: int = 64
    """Windows scored together. Part of what a seed means."""
    compile: bool = False
    """Compile the network first: about half a minute, then 2.5 times as fast on CPUs."""

    def __post_init__(self) -> None:
        if self.bound not in KEYS:
            raise UserError(f"no bound {self.bound}; there are {', '.join(KEYS)}")
        if (self.steps is None) == (self.bound == "finite-step"):
            raise UserError("--steps N belongs to --bound finite-step, which needs it")
        if self.samples is not None and self.samples < 2:
            raise UserError(f"--samples must be at least 2, not {self.samples}")
        if self.batch < 1 or not 0 < self.t_max < 1 or (self.steps is not None and self.steps < 1):
            raise UserError("--batch and --steps must be at least 1, and --t-max inside (0, 1)")

    @property
    def num_samples(self) -> int:
        """Draws per window."""
        return self.samples or max(2, math.ceil(16 / (self.steps or 1)))

    @property
    def label(self) -> str:
        """The bound's name for people."""
        return {"nelbo": "NELBO", "cross-entropy": "cross-entropy bound"}.get(
            self.bound, f"finite-step bound, {self.steps} calls:"
        )


class Window(NamedTuple):
    """A piece of a text; its first `known` tokens are clean context and not scored."""

    tokens: Int[Tensor, "l"]
    known: int = 0


@dataclass(frozen=True)
class Text:
    """A text cut into windows whose scored tokens are its tokens, each once and in order."""

    name: str
    windows: list[Window]
    source: str | None = None
    """As the user gave it, if it was text."""


def windows_of(ids: Integer[np.ndarray, "n"], length: int, context: int = 0) -> list[Window]:
    """Cuts a text into windows of at most `length` tokens.

    With `context` = 0 each window is scored on its own and the last may be shorter. Otherwise every window but the
    first sees at least `context` tokens before it, clean; all have `length` tokens if the text has as many. Either
    way the sum of the windows' bounds bounds the whole text, as written window by window.

    Raises:
        UserError: context is not in [0, length).
    """
    if not 0 <= context < length:
        raise UserError(f"--context must be at least 0 and below the run's length {length}, not {context}")
    tokens = torch.from_numpy(np.asarray(ids).astype(np.int64))
    windows, start = [], 0
    while start < len(tokens):
        end = min(len(tokens), start + length - (context if start else 0))
        begin = end - length if context and start else start
        windows.append(Window(tokens[begin:end], start - begin))
        start = end
    return windows


def seen_directions(network: Flow) -> Float[Tensor, "v d"] | None:
    """An orthonormal basis of what a network sees of x, if that is less than everything (`projected_error`).

    This is so for `linear` input without skip at V > d. With a skip the logits see all of x. Processes that share the
    network all call it.
    """
    if not network.projects:
        return None
    table = network.embedding.table.weight.detach()
    table = table.full_tensor() if isinstance(table, DTensor) else table
    return torch.linalg.qr(table.double().mT).Q


def best_times(run: Run, tokens: Int[Tensor, "b l"], steps: int, seed: int = 0) -> tuple[float, ...]:
    """The best grid for the finite-step bound on these texts, which should not be those to be scored."""
    best = optimise_grid(run.flow_map, tokens.to(run.device), steps, run.clock, generator=run.generator(seed))
    return tuple(best.tolist())


Estimator = Callable[[Tensor, Tensor | None], Bound]


def likelihood_law(run: Run) -> Law:
    """The run's law for estimates of (14): a fifth is its clock's, whose late times see the rare errors."""
    return mixture([(0.8, run.law), (0.2, run.clock)])


def integrand_of(network: Flow) -> Integrand:
    """What (14) integrates for this network: the squared error, of what it sees of x."""
    basis = seen_directions(network)
    return squared_error if basis is None else projected_error(basis)


def bound_given(
    run: Run,
    tokens: Int[Tensor, "b l"],
    known: Bool[Tensor, "b l"] | None,
    *,
    num_samples: int = 16,
    seed: int = 0,
    integrand: Integrand | None = None,
) -> Bound:
    """The NELBO (14) of texts of one window given their `known` tokens, wherever these stand; of a flow.

    `integrand_of` costs something for large vocabularies: who asks often passes its answer.

    Raises:
        UserError: The run is a baseline.
    """
    return nelbo(
        run.flow_map,
        tokens.to(run.device),
        likelihood_law(run),
        num_samples=num_samples,
        known=None if known is None else known.to(run.device),
        generator=run.generator(seed),
        integrand=integrand_of(run.flow_network) if integrand is None else integrand,
    )


def _estimator(run: Run, config: ScoringConfig, windows: Sequence[Window]) -> Estimator:
    generator, samples = run.generator(config.seed), config.num_samples
    if run.baseline is not None:  # has one bound, its own, and knows no clean context
        return lambda tokens, known: run.bound(tokens, num_samples=samples, generator=generator)
    flow_map = run.flow_map
    if config.steps is not None:
        times = grid(run.clock, config.steps) if config.times is None else torch.tensor(config.times).double()
        return lambda tokens, known: finite_step_bound(
            flow_map, tokens, times, num_samples=samples, known=known, generator=generator
        )
    integrand = capped_cross_entropy if config.bound == "cross-entropy" else integrand_of(run.flow_network)
    law = likelihood_law(run)
    if config.pilot:
        some = next(_batches(windows, PILOT_WINDOWS))
        tokens, known = _stack(run, [windows[i] for i in some])
        options = {"num_samples": samples, "t_max": config.t_max, "generator": generator, "integrand": integrand}
        law = pilot(flow_map, tokens, run.clock, known=known, **options)
    return lambda tokens, known: nelbo(
        flow_map,
        tokens,
        law,
        num_samples=samples,
        t_max=config.t_max,
        known=known,
        generator=generator,
        integrand=integrand,
    )


def _batches(windows: Sequence[Window], size: int) -> Iterator[list[int]]:
    """Indices of windows of one length, at most `size` together."""
    by_length: dict[int, list[int]] = {}
    for index, window in enumerate(windows):
        by_length.setdefault(len(window.tokens), []).append(index)
    for rows in by_length.values():
        yield from (rows[i : i + size] for i in range(0, len(rows), size))


def _stack(run: Run, windows: Sequence[Window]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
    """Tokens and known positions of windows of one length."""
    tokens = torch.stack([window.tokens for window in windows]).to(run.device)
    counts = torch.tensor([window.known for window in windows], device=run.device)
    return tokens, torch.arange(tokens.shape[1], device=run.device) < counts[:, None]


def bound_windows(run: Run, windows: Sequence[Window], config: ScoringConfig) -> list[Bound]:
    """The bound of every window, (1,) and (1, L) each; windows of one length are scored together.

    Raises:
        UserError: A baseline is asked for another bound than its own, or for context.
    """
    context = any(window.known for window in windows)
    if run.baseline is not None and (context or config.pilot or config.bound != "nelbo"):
        raise UserError(f"run {run.path} is a {run.kind}: leave out --bound, --context and --pilot, it has its own")
    if config.compile:
        compile_blocks(run.network)
    estimate, bounds = _estimator(run, config, windows), {}
    for part in _batches(windows, config.batch):
        tokens, known = _stack(run, [windows[i] for i in part])
        known = known if context else None
        # Code is compiled for one shape: the rare others are not worth another half minute.
        usual = not config.compile or tokens.shape == (config.batch, run.config.data.length)
        with contextlib.nullcontext() if usual else torch.compiler.set_stance("force_eager"):
            bound = estimate(tokens, known)
        bounds |= {i: Bound(*(value[row : row + 1] for value in bound)) for row, i in enumerate(part)}
    return [bounds[i] for i in range(len(windows))]


def score_texts(run: Run, texts: Sequence[Text], config: ScoringConfig) -> list[TextScore]:
    """The bound of every text.

    Raises:
        UserError: Nothing to score.
    """
    windows = [window for text in texts for window in text.windows]
    if not any(len(window.tokens) for window in windows):
        named = ", ".join(text.name for text in texts[:3])
        raise UserError(f"there is nothing to score in {named}: empty, or without a character of {run.tokenizer.name}")
    bounds = iter(bound_windows(run, windows, config))
    scores, none = [], torch.zeros(0, dtype=torch.float64)
    for text in texts:
        own = [next(bounds) for _ in text.windows]
        ids = [window.tokens[window.known :] for window in text.windows]
        token_ids = torch.cat([torch.zeros(0, dtype=torch.int64), *ids])
        nats = [bound.per_token[0, window.known :] for bound, window in zip(own, text.windows, strict=True)]
        # Decoded as one: a window may end inside a character.
        decoded = run.tokenizer.decode(token_ids.numpy())
        scores.append(
            TextScore(
                text.name,
                torch.cat([none, *(bound.nats for bound in own)]),
                torch.cat([none, *(bound.stderr for bound in own)]),
                torch.tensor([len(part) for part in ids], dtype=torch.float64),
                token_ids,
                torch.cat([none, *nats]),
                characters=len(decoded),
                bytes=len(decoded.encode()),
                normalised=text.source is not None and decoded != text.source,
            )
        )
    return scores


def score(
    run: Run,
    windows: Int[Tensor, "n l"],
    tail: Int[Tensor, "1 k"] | None = None,
    *,
    num_samples: int = 16,
    seed: int = 0,
    batch: int = 64,
) -> Score:
    """The NELBO of one text in windows of equal length, and a shorter last one if given.

    Raises:
        UserError: Nothing to score, or fewer than 2 samples.
    """
    config = ScoringConfig(samples=num_samples, seed=seed, batch=batch)
    rows = [*windows, *([] if tail is None else tail)]
    return pool(score_texts(run, [Text("", [Window(row) for row in rows])], config), num_samples)


def cut(run: Run, text: str) -> tuple[Int[Tensor, "n l"], Int[Tensor, "1 k"] | None]:
    """The windows of a text, and its shorter tail."""
    ids = torch.from_numpy(run.tokenizer.encode(text).astype("int64"))
    length = run.config.data.length
    whole = len(ids) // length * length
    return ids[:whole].view(-1, length), ids[None, whole:] if whole < len(ids) else None
