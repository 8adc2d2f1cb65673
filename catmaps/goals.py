"""What a text can be steered towards, by name, and steering a run there.

To add a goal write a function (argument, strength, tokenizer, words) -> Goal and enter it in GOALS.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.errors import UserError
from catmaps.flow.particles import Particles
from catmaps.flow.steering import RelaxedReward, Reward, Tilt, tilt
from catmaps.generation import SamplingConfig
from catmaps.infill import Template, encode
from catmaps.model import Run
from catmaps.text.tokenizers import Tokenizer

Words = Callable[[], Collection[str]]


@dataclass(frozen=True)
class Goal:
    """A reward, in nats, and the figure that tells people how far a text is."""

    name: str
    measure: Callable[[str], float]
    reward: Reward
    relaxed: RelaxedReward | None = None


def contains(argument: str, strength: float, tokenizer: Tokenizer, words: Words) -> Goal:
    """The text holds these tokens somewhere. Each token that is wrong at the best place costs `strength` nats:

    r = log sum over places of prod_j max(p(token j), exp(-strength)), for tokens and for distributions alike.
    """
    del words
    if not argument:
        raise UserError("contains what? --reward contains:WORD")
    ids = torch.from_numpy(encode(argument, tokenizer))
    said = tokenizer.decode(ids.numpy())

    def relaxed(p: Float[Tensor, "b l v"]) -> Float[Tensor, "b"]:
        places = p.shape[1] - len(ids) + 1
        if places < 1:
            raise UserError(f"{said!r} has {len(ids)} tokens, the text {p.shape[1]}: it cannot hold it")
        floor = math.exp(-strength)
        rows = (floor + (1 - floor) * p[..., ids.to(p.device)]).log()
        return sum((rows[:, j : j + places, j] for j in range(len(ids))), torch.zeros((), device=p.device)).logsumexp(1)

    def reward(tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b"]:
        return relaxed(torch.nn.functional.one_hot(tokens, tokenizer.vocab_size).double())

    return Goal(f"contains {said!r}", lambda text: float(said in text), reward, relaxed)


def word_length(argument: str, strength: float, tokenizer: Tokenizer, words: Words) -> Goal:
    """Letters per word, as near as can be: r = -strength |mean - wanted|."""
    del words
    try:
        wanted = float(argument)
    except ValueError:
        raise UserError(f"word-length needs a number of letters, as in word-length:5.5, not {argument!r}") from None

    def measure(text: str) -> float:
        parts = text.split()
        return sum(map(len, parts)) / len(parts) if parts else 0.0

    return _of_text("letters per word", measure, lambda text: -strength * abs(measure(text) - wanted), tokenizer)


def valid_words(argument: str, strength: float, tokenizer: Tokenizer, words: Words) -> Goal:
    """Words of the training text: r = strength (share - 1) over the words of a text, those cut at its ends left out."""
    if argument:
        raise UserError("valid-words takes no argument")
    known = words()

    def measure(text: str) -> float:
        whole = [word for word in text.split(" ")[1:-1] if word]
        return sum(word in known for word in whole) / len(whole) if whole else 0.0

    return _of_text("share of valid words", measure, lambda text: strength * (measure(text) - 1), tokenizer)


def _of_text(name: str, measure: Callable[[str], float], value: Callable[[str], float], tokenizer: Tokenizer) -> Goal:
    def reward(tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b"]:
        values = [value(tokenizer.decode(row)) for row in tokens.cpu().numpy()]
        return torch.tensor(values, dtype=torch.float64, device=tokens.device)

    return Goal(name, measure, reward)


GOALS: dict[str, Callable[[str, float, Tokenizer, Words], Goal]] = {
    "contains": contains,
    "word-length": word_length,
    "valid-words": valid_words,
}


def read_goal(spec: str, strength: float, tokenizer: Tokenizer, words: Words) -> Goal:
    """The goal that `NAME` or `NAME:ARGUMENT` names.

    Args:
        spec: Such as contains:castle.
        strength: In nats; what it multiplies is the goal's matter.
        tokenizer: Of the run.
        words: Gives the words of the training text; called only where they are needed.

    Raises:
        UserError: No such goal, or a wrong argument.
    """
    name, _, argument = spec.partition(":")
    if name not in GOALS:
        raise UserError(f"no reward {name}; there are {', '.join(GOALS)}")
    if strength <= 0:
        raise UserError(f"--strength must be above 0, not {strength}")
    return GOALS[name](argument, strength, tokenizer, words)


class Steered(NamedTuple):
    """Texts of one batch of runs, and the particles they come from."""

    texts: Int[Tensor, "b l"]
    particles: Particles


@dataclass(frozen=True, kw_only=True)
class SteeringConfig:
    """How a run is steered."""

    tilt: Tilt
    steps: int
    seed: int = 0
    batch: int = 64
    """Particles that move together; at least those of one text. Part of what a seed means."""
    noise: float | None = None
    """Variance of the noise that renoising adds, as in SamplingConfig."""
    best: bool = False
    """Take the particle of highest reward instead of a draw by weight."""

    def __post_init__(self) -> None:
        _ = self.sampling  # refuses what sampling refuses

    @property
    def sampling(self) -> SamplingConfig:
        """The sampler of the particles, whose law is tilted."""
        return SamplingConfig(sampler=self.tilt.move, steps=self.steps, noise=self.noise)


def default_steering(run: Run, goal: Goal, *, particles: int = 16, gradient: bool = False) -> SteeringConfig:
    """A map renoises in 8 steps; a base, and whatever follows a gradient, goes by 64 ancestral ones.

    Raises:
        UserError: A gradient of a reward that has none.
    """
    if gradient and goal.relaxed is None:
        raise UserError(f"{goal.name} is no differentiable reward; leave --gradient out")
    wanted = Tilt(reward=goal.reward, particles=particles, lookahead="map" if run.is_map else "diagonal")
    if run.is_map and not gradient:
        return SteeringConfig(tilt=wanted, steps=8)
    relaxed = goal.relaxed if gradient else None
    return SteeringConfig(tilt=replace(wanted, move="localisation", relaxed=relaxed), steps=64)


def steer(
    run: Run, config: SteeringConfig, num: int, *, length: int | None = None, template: Template | None = None
) -> Iterator[Steered]:
    """`num` texts, each from a run of particles of its own; yields batches of them.

    Args:
        run: A base or a map.
        config: The tilt, and how it is done.
        num: How many texts.
        length: Tokens of a text; None: the run's window.
        template: Given text and blanks, in place of a length; rewards see the whole.

    Raises:
        UserError: A baseline, or a text longer than the window.
    """
    window = run.config.data.length
    length = len(template.tokens) if template is not None else length or window
    if length > window:
        raise UserError(f"the text has {length} tokens; the window of {run.path} holds {window}")
    variance, times = config.sampling.variance(run), config.sampling.times(run)
    wanted = config.tilt if variance is None else replace(config.tilt, noise=variance)
    together = max(1, config.batch // config.tilt.particles)
    for first in range(0, num, together):
        rows = min(together, num - first)
        generator = run.generator(config.seed * 1_000_003 + first)
        tokens, known = _given(run, template, rows)
        shape = (rows, length, run.tokenizer.vocab_size)
        found = tilt(run.flow_map, wanted, times, shape, tokens=tokens, known=known, generator=generator)
        yield Steered(found.best() if config.best else found.draw(generator), found)


def _given(
    run: Run, template: Template | None, rows: int
) -> tuple[Int[Tensor, "b l"] | None, Bool[Tensor, "b l"] | None]:
    if template is None:
        return None, None
    parts = (torch.from_numpy(np.ascontiguousarray(part)).to(run.device) for part in (template.tokens, template.known))
    tokens, known = (part.expand(rows, -1) for part in parts)
    return tokens, known
