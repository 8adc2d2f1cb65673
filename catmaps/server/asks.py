"""From a request to texts that are to be written, or the reason why not."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from catmaps.errors import UserError
from catmaps.generation import default_sampling, next_window
from catmaps.infill import BLANK, Template, encode
from catmaps.model import Run
from catmaps.server.limits import ApiError, Limits
from catmaps.server.pieces import Ids, Settings

if TYPE_CHECKING:
    from catmaps.server.schema import CompletionRequest

LEAST_TEMPERATURE = 0.05
"""What 0 stands for: the sampler divides by it."""
DEFAULT_TOKENS = 16


@dataclass(frozen=True, eq=False)
class Order:
    """One text to be written: what follows a prompt, or the blanks of a template of one window."""

    tokens: Int[np.ndarray, "l"]
    """Given text; of a template, with blanks."""
    known: Bool[np.ndarray, "l"] | None
    """Of a template: where text is given. None for a prompt."""
    more: int
    """Tokens to write after a prompt."""
    shown: slice
    """What of a template is the answer."""
    whole: bool = False
    """Whether that is all of it, given text included."""

    @property
    def given(self) -> int:
        """Tokens that are given."""
        return len(self.tokens) if self.known is None else int(self.known.sum())

    @classmethod
    def after(cls, prompt: Ids, more: int) -> "Order":
        return cls(prompt, None, more, slice(None))

    @classmethod
    def blanks(cls, template: Template) -> "Order":
        return cls(template.tokens, template.known, 0, slice(0, len(template.tokens)), whole=True)

    @classmethod
    def between(cls, before: Ids, after: Ids, more: int) -> "Order":
        tokens = np.concatenate([before, np.zeros(more, dtype=np.int64), after])
        shown = slice(len(before), len(before) + more)
        known = np.ones(len(tokens), dtype=bool)
        known[shown] = False
        return cls(tokens, known, 0, shown)


@dataclass(frozen=True, eq=False)
class Ask:
    """A request that can be carried out."""

    orders: list[Order]
    copies: int
    """Texts of each order."""
    settings: Settings
    seed: int
    stops: tuple[str, ...]
    echo: bool
    logprobs: bool
    trajectory: int | None
    stream: bool
    usage: bool
    """Whether a stream ends with the counts."""

    @property
    def choices(self) -> int:
        return len(self.orders) * self.copies


def read(body: "CompletionRequest", run: Run, model: str, limits: Limits) -> Ask:
    """Checks what the schema cannot.

    Raises:
        ApiError: What is asked for is not to be had.
    """
    if body.model is not None and body.model != model:
        message = f"no model {body.model[:80]!r} here; there is {model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(422, "best_of must equal n: texts are not ranked", param="best_of")
    try:
        orders = _orders(body, run, limits)
    except UserError as error:
        raise ApiError(400, str(error), param="prompt" if body.infill is None else "infill") from error
    ask = Ask(
        orders,
        body.n or 1,
        _settings(body, run, limits),
        secrets.randbits(31) if body.seed is None else body.seed,
        _stops(body),
        bool(body.echo),
        body.logprobs is not None,
        body.trajectory,
        bool(body.stream),
        body.stream_options is not None and body.stream_options.include_usage,
    )
    _check(ask, body, run, limits)
    return ask


def _settings(body: "CompletionRequest", run: Run, limits: Limits) -> Settings:
    config = default_sampling(run, body.num_steps)
    if config.steps > limits.steps:
        raise ApiError(422, f"num_steps is at most {limits.steps}, not {config.steps}", param="num_steps")
    temperature = 1.0 if body.temperature is None else max(body.temperature, LEAST_TEMPERATURE)
    top_p = 1.0 if body.top_p is None else body.top_p
    settings = Settings(body.sampler or config.sampler, config.steps, temperature, top_p, body.noise)
    try:
        _ = settings.config
    except UserError as error:  # the schema has seen to all but the noise of other samplers
        raise ApiError(422, str(error), param="noise") from error
    return settings


def _stops(body: "CompletionRequest") -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def _check(ask: Ask, body: "CompletionRequest", run: Run, limits: Limits) -> None:
    most = min(limits.choices, limits.rows)
    if ask.choices > most:
        raise ApiError(422, f"{ask.choices} texts in one request; at most {most}", param="n")
    if ask.trajectory is not None and (ask.stream or any(_blocks(order, run) != 1 for order in ask.orders)):
        raise ApiError(400, "a trajectory is of a text of one window, and is not streamed", param="trajectory")
    if body.infill is not None and (ask.stops or ask.echo or body.max_tokens is not None):
        raise ApiError(400, "a text with blanks has its length: leave out stop, echo and max_tokens", param="infill")
    if body.suffix and ask.echo:
        raise ApiError(400, "echo is for prompts without suffix", param="echo")
    if ask.logprobs and ask.echo and body.max_tokens != 0:
        what = "logprobs with echo bound a given text as a whole: that needs max_tokens 0"
        raise ApiError(400, f"{what}; for benchmarks of choices use `catmaps eval`", param="logprobs")
    if body.max_tokens == 0 and not (ask.echo and ask.logprobs and all(len(order.tokens) for order in ask.orders)):
        raise ApiError(400, "nothing to write: max_tokens 0 is for echo with logprobs of a prompt", param="max_tokens")


def _blocks(order: Order, run: Run) -> int:
    """Windows that a text takes."""
    if order.known is not None:
        return 1
    have, rest, blocks = len(order.tokens), order.more, 0
    while rest:
        context, window = next_window(have, rest, run.config.data.length)
        have, rest, blocks = have + window - context, rest - (window - context), blocks + 1
    return blocks


def _orders(body: "CompletionRequest", run: Run, limits: Limits) -> list[Order]:
    if body.infill is not None:
        if body.prompt not in (None, "") or body.suffix is not None:
            raise UserError("infill stands for prompt and suffix: leave these out")
        return [Order.blanks(blanks(body.infill, run))]
    more = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    if more > limits.tokens:
        raise ApiError(422, f"max_tokens is at most {limits.tokens}, not {more}", param="max_tokens")
    prompts = [_ids(prompt, run) for prompt in _prompts(body, limits)]
    if not body.suffix:
        return [Order.after(prompt, more) for prompt in prompts]
    return [_between(prompt, encode(body.suffix, run.tokenizer), more, run) for prompt in prompts]


def _prompts(body: "CompletionRequest", limits: Limits) -> Sequence[str | list[int]]:
    prompt = "" if body.prompt is None else body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise UserError("an empty list of prompts")
    if isinstance(prompt[0], int):
        return [[i for i in prompt if isinstance(i, int)]]
    if len(prompt) > limits.choices:
        raise ApiError(422, f"{len(prompt)} prompts in one request; at most {limits.choices}", param="prompt")
    return [part for part in prompt if not isinstance(part, int)]


def _ids(prompt: str | list[int], run: Run) -> Ids:
    if isinstance(prompt, str):
        return encode(prompt, run.tokenizer)
    if prompt and max(prompt) >= run.tokenizer.vocab_size:
        raise UserError(f"token {max(prompt)} is outside the alphabet of {run.tokenizer.vocab_size}")
    return np.array(prompt, dtype=np.int64)


def _fits(length: int, run: Run) -> None:
    if length > run.config.data.length:
        raise UserError(f"the text has {length} tokens, blanks included; a window holds {run.config.data.length}")


def blanks(text: str, run: Run) -> Template:
    """A text with blanks that fits a window; refused before blanks of any size take memory.

    Raises:
        UserError: It does not, or is none.
    """
    sizes = [match[1] for match in BLANK.finditer(text)]
    _fits(max((10**9 if len(size) > 9 else int(size) for size in sizes), default=0), run)  # before it takes memory
    _fits(len(sizes), run)
    template = Template.read(text, run.tokenizer)
    _fits(len(template.tokens), run)
    return template


def _between(before: Ids, after: Ids, more: int, run: Run) -> Order:
    if more < 1:
        raise UserError("nothing to write between prompt and suffix: max_tokens must be at least 1")
    _fits(len(before) + more + len(after), run)
    return Order.between(before, after, more)
