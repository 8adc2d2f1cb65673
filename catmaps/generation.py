"""Texts from a run, in batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from catmaps.errors import UserError
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.samplers import SAMPLERS, sample
from catmaps.flow.times import grid
from catmaps.model import Run


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How texts are drawn."""

    steps: int = 4
    """Steps of the sampler; network calls too, but for heun, which makes 2 steps - 1."""
    sampler: str = "flow_map"
    """One of flow_map, euler, heun, renoise, localisation."""
    seed: int = 0
    temperature: float = 1.0
    """Divides the logits; below 1 is cleaner and less diverse."""
    batch: int = 64
    """Texts drawn together. Part of what a seed means: other batches are other texts."""

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"no sampler {self.sampler}; there are {', '.join(SAMPLERS)}")
        if self.steps < 1 or self.batch < 1 or self.temperature <= 0:
            raise UserError("steps and batch must be at least 1, temperature above 0")

    @property
    def calls(self) -> int:
        """Network calls of one text (NFE)."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps


def default_sampling(run: Run, steps: int | None = None) -> SamplingConfig:
    """A map jumps in 4 calls; a base is followed by 64 Euler steps."""
    if run.is_map:
        return SamplingConfig(steps=4 if steps is None else steps)
    return SamplingConfig(steps=64 if steps is None else steps, sampler="euler")


def generate(
    run: Run,
    num: int,
    config: SamplingConfig,
    *,
    length: int | None = None,
    watch: Callable[[float, Float[Tensor, "b l v"]], None] | None = None,
) -> Iterator[Int[Tensor, "b l"]]:
    """Draws `num` texts; yields the token ids of one batch after another.

    Args:
        run: A base or a map.
        num: How many.
        config: How.
        length: Tokens of a text; None: as in training.
        watch: Sees (t, endpoint) after every step.
    """
    flow_map = FlowMap(run.network, config.temperature)
    times = grid(run.clock, config.steps)
    length = length or run.config.data.length
    for first in range(0, num, config.batch):
        generator = run.generator(config.seed * 1_000_003 + first)
        # The last batch is drawn whole and cut, so that a text does not depend on how many were asked for.
        shape = (config.batch if num > config.batch else num, length, run.tokenizer.vocab_size)
        drawn = sample(flow_map, SAMPLERS[config.sampler], times, shape, generator=generator, watch=watch)
        yield drawn[: num - first].cpu()


def generate_texts(run: Run, num: int, config: SamplingConfig) -> list[str]:
    """`generate`, decoded."""
    return [run.tokenizer.decode(row.numpy()) for batch in generate(run, num, config) for row in batch]
