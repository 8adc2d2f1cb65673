"""Writing on after prompts until something says stop: lm-eval's `generate_until`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from catmaps.errors import UserError
from catmaps.evaluation.encoding import Encoder
from catmaps.generation import SamplingConfig, continue_tokens
from catmaps.model import Run

_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens")
_IDLE = ("do_sample",)


@dataclass(frozen=True)
class Writing:
    """What to write after a prompt."""

    prompt: tuple[int, ...]
    stops: tuple[str, ...]
    most: int
    """Tokens."""
    temperature: float
    truncated: bool
    """Whether the prompt has lost its beginning."""

    @classmethod
    def of(cls, context: str, options: Mapping[str, Any], encoder: Encoder, name: str) -> "Writing":
        """Reads lm-eval's options: `until`, the most tokens (256), and a positive temperature.

        `do_sample` and a temperature of 0 mean nothing to a flow, whose text is that of its noise: they leave the
        temperature at 1. An empty context is the end of a document where the tokenizer has one.

        Raises:
            UserError: Another option, or a prompt that leaves no room for the first block.
        """
        unknown = set(options) - {"until", "temperature", *_MOST, *_IDLE}
        if unknown:
            raise UserError(
                f"{name}: generate_until has no option {min(unknown)}; set it aside with a task of your own"
            )
        stops = options.get("until") or []
        most = next((int(options[key]) for key in _MOST if options.get(key) is not None), 256)
        whole = encoder.encode(context) if context else encoder.start
        prompt = encoder.fit(whole, encoder.length - min(most, block(encoder.length)), name)
        return cls(
            tuple(prompt.tolist()),
            tuple([stops] if isinstance(stops, str) else stops),
            most,
            float(options.get("temperature") or 1.0),
            len(prompt) < len(whole),
        )


def block(length: int) -> int:
    """Tokens written at a time into a window of so many."""
    return length - length // 2


def write(run: Run, asked: Sequence[Writing], config: SamplingConfig) -> dict[Writing, str]:
    """The text of each, without its prompt and without what stopped it.

    It is written block by block so long as nothing says stop. Equal requests get one text. Requests are drawn in the
    order of their ids, `config.batch` together: which stand together is part of what a seed means, their order in
    `asked` is not.
    """
    texts = {one: list(one.prompt) for one in set(asked)}
    at_work, blocks = sorted(texts, key=lambda one: (one.prompt, one.stops, one.most, one.temperature)), 0
    while at_work:
        together: dict[tuple[int, float], list[Writing]] = {}
        for one in at_work:
            size = min(block(run.config.data.length), one.most - (len(texts[one]) - len(one.prompt)))
            together.setdefault((size, one.temperature), []).append(one)
        for (size, temperature), members in together.items():
            how = replace(config, temperature=temperature, seed=config.seed + 7919 * blocks)
            prompts = [np.array(texts[one], dtype=np.int64) for one in members]
            for one, new in zip(members, continue_tokens(run, prompts, size, how), strict=True):
                texts[one] += new.tolist()
        at_work = [one for one in at_work if not _finish(run, one, texts[one])[1]]
        blocks += 1
    return {one: _finish(run, one, text)[0] for one, text in texts.items()}


def _finish(run: Run, one: Writing, ids: list[int]) -> tuple[str, bool]:
    """(the text so far, whether it is complete)."""
    new = ids[len(one.prompt) :]
    eos = run.tokenizer.eos_id
    ended = eos is not None and eos in new
    text = run.tokenizer.decode(new[: new.index(eos)] if ended and eos is not None else new)
    places = [place for stop in one.stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))], ended or bool(places) or len(new) >= one.most
