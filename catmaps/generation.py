"""Texts from a run, in batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.errors import UserError
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.guidance import Guided, Nucleus, Unprompted
from catmaps.flow.interpolant import gaussian
from catmaps.flow.noise import Noise, Randomness, Streams
from catmaps.flow.samplers import SAMPLERS, Step, few_step_variance, renoise_bend, renoising, sample
from catmaps.flow.times import grid
from catmaps.model import Run

ANCESTRAL = "ancestral"  # what a baseline's own sampler is called; a family has but one


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How texts are drawn."""

    steps: int = 4
    """Steps of the sampler; network calls too, but for heun, which makes 2 steps - 1."""
    sampler: str = "renoise"
    """One of renoise, flow_map, euler, heun, localisation; ancestral for baselines."""
    seed: int = 0
    temperature: float = 1.0
    """Multiplies the variance of the first noise and, but for renoise, divides the logits; below 1 is cleaner and less
    diverse."""
    noise: float | None = None
    """Variance of the noise that renoise adds, a share of the path's: 1 is eq. (13), below it texts are likelier and in
    the end less diverse. None: 0.5, in N > 4 steps 1 - 2 / N, and 1 for imported maps."""
    batch: int = 64
    """Texts drawn together. Part of what a seed means: other batches are other texts."""
    top_p: float = 1.0
    """Below 1: of every endpoint, before temperature, the likeliest tokens of this mass. For flows, as is guidance."""
    guidance: float = 1.0
    """Above 1: away from `weak`, or without one from the run that does not see given text, at two calls a step."""
    weak: FlowMap | None = None
    """A weaker flow of the same alphabet."""

    def __post_init__(self) -> None:
        if self.sampler not in (*SAMPLERS, ANCESTRAL):
            raise UserError(f"no sampler {self.sampler}; there are {', '.join(SAMPLERS)}")
        if self.steps < 1 or self.batch < 1 or self.temperature <= 0:
            raise UserError("steps and batch must be at least 1, temperature above 0")
        if self.noise is not None and self.sampler != "renoise":
            raise UserError(f"noise is for the sampler renoise, not {self.sampler}")
        if self.noise is not None and self.noise < 0:
            raise UserError(f"noise is a variance, at least 0, not {self.noise:g}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is a share of the mass, above 0 and at most 1, not {self.top_p}")

    def times(self, run: Run) -> Float[Tensor, "n"]:
        """The sampler's grid on the run's clock."""
        return grid(run.clock, self.steps, self.bend(run))

    def bend(self, run: Run) -> float:
        """Of N steps the times stand at (i / N)^bend of the clock."""
        variance = self.variance(run)
        return 1.0 if variance is None or run.config.published is not None else renoise_bend(variance)

    def variance(self, run: Run) -> float | None:
        """Of the noise that renoising adds, a share of the path's; None for the other samplers."""
        if self.sampler != "renoise" or self.noise is not None:
            return self.noise
        return few_step_variance(self.steps) if run.config.published is None else 1.0

    def step(self, run: Run) -> Step:
        """The sampler's step."""
        variance = self.variance(run)
        return SAMPLERS[self.sampler] if variance is None else renoising(variance)

    @property
    def calls(self) -> int:
        """Network calls of one text, or of one block of a longer one (NFE)."""
        return (2 * self.steps - 1 if self.sampler == "heun" else self.steps) * (1 if self.guidance == 1 else 2)

    def flow_map(
        self, run: Run, shape: tuple[int, int], known: Bool[Tensor, "b l"] | None, generator: Randomness
    ) -> FlowMap:
        """The run's flow map, guided and cut as configured, for a batch of texts (B, L)."""
        chosen = run.flow_map
        if self.guidance != 1 and (self.weak is not None or known is not None):
            whole = (*shape, run.tokenizer.vocab_size)
            weak = self.weak or FlowMap(Unprompted(chosen, _noise(chosen, whole, generator)))
            chosen = FlowMap(Guided(chosen, weak, self.guidance))
        if self.top_p < 1:
            chosen = FlowMap(Nucleus(chosen, self.top_p))
        # Dividing logits as well makes renoised texts less likely and no more varied (docs/log.md).
        return FlowMap(chosen.denoiser, 1.0 if self.sampler == "renoise" else self.temperature)


def _noise(flow_map: FlowMap, shape: tuple[int, int, int], generator: Randomness) -> Float[Tensor, "b l v"] | Noise:
    """x_0 of given text, from streams made when needed unless it fits in a tile."""
    if isinstance(generator, Streams):
        noise = generator.noise(*shape[1:])
        return noise.x if flow_map.holds(*shape[:2]) else noise
    return gaussian(shape, generator).x


def default_sampling(run: Run, steps: int | None = None) -> SamplingConfig:
    """A map jumps and renoises, in 4 calls; a base is followed by 64 Euler steps, as a baseline by 64 ancestral ones.

    An autoregressive run makes one call per token, whatever is asked for; an imported map jumps along the map.
    """
    if run.baseline is not None:
        calls = run.config.data.length if run.baseline.sequential else 64 if steps is None else steps
        return SamplingConfig(steps=calls, sampler=ANCESTRAL)
    if run.is_map:
        sampler = "renoise" if run.config.published is None else "flow_map"
        return SamplingConfig(steps=4 if steps is None else steps, sampler=sampler)
    return SamplingConfig(steps=64 if steps is None else steps, sampler="euler")


Watch = Callable[[float, Float[Tensor, "b l v"]], None]


def generate(
    run: Run, num: int, config: SamplingConfig, *, length: int | None = None, watch: Watch | None = None
) -> Iterator[Int[Tensor, "b {length}"]]:
    """Draws `num` texts; yields the token ids of one batch after another.

    Args:
        run: A base, a map or a baseline.
        num: How many.
        config: How.
        length: Tokens of a text; None: as in training. Longer texts are written block by block (`extend`).
        watch: Sees (t, endpoint) after every step.
    """
    length = length or run.config.data.length
    for first in range(0, num, config.batch):
        generator = run.generator(config.seed * 1_000_003 + first)
        # The last batch is drawn whole and cut, so that a text does not depend on how many were asked for.
        empty = torch.empty(config.batch if num > config.batch else num, 0, dtype=torch.long, device=run.device)
        yield extend(run, empty, length, config, generator, watch)[: num - first].cpu()


def next_window(have: int, rest: int, longest: int) -> tuple[int, int]:
    """(context, tokens) of the window that goes on after `have` tokens when `rest` are wanted: it sees `context` of the
    former, and at least half of it is new while so much is wanted."""
    context = min(have, longest - min(rest, longest - longest // 2))
    return context, min(longest, context + rest)


def extend(
    run: Run,
    prompt: Int[Tensor, "b n"],
    num_tokens: int,
    config: SamplingConfig,
    generator: torch.Generator,
    watch: Watch | None = None,
) -> Int[Tensor, "b {num_tokens}"]:
    """Goes on after a prompt, block by block: all `blocks` in one."""
    new = list(blocks(run, prompt, num_tokens, config, generator, watch))
    return torch.cat([prompt[:, :0], *new], 1)


def blocks(
    run: Run,
    prompt: Int[Tensor, "b n"],
    num_tokens: int,
    config: SamplingConfig,
    generator: torch.Generator,
    watch: Watch | None = None,
) -> Iterator[Int[Tensor, "b _"]]:
    """The new tokens of one block after another: the end of the text so far stands clean at the left of a window of the
    training length, and what is right of it is drawn (`next_window`).

    Args:
        run: A base or a map.
        prompt: Token ids, perhaps none, on the run's device.
        num_tokens: How many to write.
        config: How; its steps are those of every block.
        generator: Source of randomness, on the run's device.
        watch: Sees (t, endpoint) after every step of every block, whose window begins with the context.
    """
    text, wanted, longest = prompt, prompt.shape[1] + num_tokens, run.config.data.length
    while (rest := wanted - text.shape[1]) > 0:
        context, window = next_window(text.shape[1], rest, longest)
        tokens = torch.nn.functional.pad(text[:, text.shape[1] - context :], (0, window - context))
        known = (torch.arange(window, device=run.device) < context).expand(len(text), window)
        given = (tokens, known) if context else (None, None)
        new = draw(run, (len(text), window), *given, config, generator, watch)[:, context:]
        text = torch.cat([text, new], 1)
        yield new


def draw(
    run: Run,
    shape: tuple[int, int],
    tokens: Int[Tensor, "b l"] | None,
    known: Bool[Tensor, "b l"] | None,
    config: SamplingConfig,
    generator: Randomness,
    watch: Watch | None,
) -> Int[Tensor, "b l"]:
    """Texts of one window, given tokens unchanged. Baselines are not watched: they have no endpoint; nor do they take
    streams by row.

    Raises:
        UserError: The sampler or an option is not for this run.
    """
    if (config.sampler == ANCESTRAL) != (run.baseline is not None):
        raise UserError(f"run {run.path} is a {run.kind}: sampler {config.sampler} is not for it; leave --sampler out")
    if run.baseline is not None and (config.top_p, config.guidance) != (1, 1):
        raise UserError(f"run {run.path} is a {run.kind}: top-p and guidance are for flows; leave them out")
    if run.baseline is not None:
        assert isinstance(generator, torch.Generator)
        given = {"tokens": tokens, "known": known, "generator": generator, "temperature": config.temperature}
        return run.baseline.sample(run.network, shape, config.steps, **given)
    flow_map, times = config.flow_map(run, shape, known, generator), config.times(run)
    whole = (*shape, run.tokenizer.vocab_size)
    return sample(
        flow_map,
        config.step(run),
        times,
        whole,
        tokens=tokens,
        known=known,
        generator=generator,
        watch=watch,
        variance=config.temperature,
    )


def continue_tokens(
    run: Run, prompts: Sequence[Int[np.ndarray, " _"]], num_tokens: int, config: SamplingConfig
) -> list[Int[np.ndarray, " {num_tokens}"]]:
    """Continuations of prompts, in their order. Prompts of one length are drawn together, `config.batch` at a time."""
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    written: dict[int, np.ndarray] = {}
    for _, members in sorted(by_length.items()):
        for first in range(0, len(members), config.batch):
            batch = members[first : first + config.batch]
            ids = torch.from_numpy(np.stack([prompts[i] for i in batch]).astype(np.int64)).to(run.device)
            generator = run.generator(config.seed * 1_000_003 + batch[0])
            new = extend(run, ids, num_tokens, config, generator).cpu().numpy()
            written.update(zip(batch, new, strict=True))
    return [written[i] for i in range(len(prompts))]


def generate_texts(run: Run, num: int, config: SamplingConfig, length: int | None = None) -> list[str]:
    """`generate`, decoded."""
    drawn = generate(run, num, config, length=length)
    return [run.tokenizer.decode(row.numpy()) for batch in drawn for row in batch]
