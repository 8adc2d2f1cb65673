"""Texts with blanks, and texts to go on with: what users give to a run, as tokens, and what it writes.

A blank is marked [[N]] and holds N tokens: "the [[12]] of the [[5]]". Given tokens never change.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from catmaps.errors import UserError
from catmaps.generation import SamplingConfig, draw, extend
from catmaps.model import Run
from catmaps.text.tokenizers import Tokenizer

BLANK = re.compile(r"\[\[(\d+)\]\]")


@dataclass(frozen=True)
class Template:
    """A text of L tokens, some of them to be written."""

    tokens: Int[np.ndarray, "l"]
    """Ids; those of blanks mean nothing."""
    known: Bool[np.ndarray, "l"]
    """Where tokens are given."""

    @classmethod
    def read(cls, text: str, tokenizer: Tokenizer) -> "Template":
        """Reads a text with blanks. What stands between two blanks is encoded on its own.

        Raises:
            UserError: No blank, an empty one, or characters outside the alphabet.
        """
        pieces = BLANK.split(text)  # text, size, text, size, ..., text
        if len(pieces) == 1:
            raise UserError(f"no blank in {text!r}: mark one with [[N]], N tokens, as in 'the [[12]] of'")
        tokens: list[int] = []
        known: list[bool] = []
        for i, piece in enumerate(pieces):
            if i % 2 and int(piece) < 1:
                raise UserError(f"a blank of {piece} tokens in {text!r}: [[N]] needs N >= 1")
            new = [0] * int(piece) if i % 2 else encode(piece, tokenizer).tolist()
            tokens += new
            known += [not i % 2] * len(new)
        return cls(np.array(tokens, dtype=np.int64), np.array(known))


def encode(text: str, tokenizer: Tokenizer) -> Int[np.ndarray, " _"]:
    """Ids of given text.

    Raises:
        UserError: A letter or digit that the alphabet drops; marks and capitals may be folded, as in training.
    """
    for character in dict.fromkeys(text):
        if character.isalnum() and not tokenizer.normalise(character).strip():
            raise UserError(f"{character!r} is outside the alphabet of {tokenizer.name}: write the text without it")
    return tokenizer.encode(text).astype(np.int64) if text else np.zeros(0, dtype=np.int64)


def fill(run: Run, template: Template, num: int, config: SamplingConfig) -> Iterator[Int[Tensor, "b l"]]:
    """`num` texts with their blanks filled, one batch after another; given tokens stand in each as they are.

    Args:
        run: A flow or a baseline. Autoregressive ones only go on after a beginning.
        template: The text, at most as long as the run's window.
        num: How many.
        config: How.

    Raises:
        UserError: Too long a text, nothing to write, or a sampler or blanks that are not for this run.
    """
    length, window = len(template.tokens), run.config.data.length
    if length > window:
        raise UserError(f"the text has {length} tokens, blanks included; the window of {run.path} holds {window}")
    if bool(template.known.all()):
        raise UserError("every token is given: leave a blank")
    gaps = bool((np.diff(template.known.astype(int)) > 0).any())
    if run.baseline is not None and run.baseline.sequential and gaps:
        raise UserError(f"run {run.path} is a {run.kind}, which writes left to right: leave blanks at the end only")
    given = torch.from_numpy(template.tokens).to(run.device), torch.from_numpy(template.known).to(run.device)
    for first in range(0, num, config.batch):
        # The last batch is drawn whole and cut, as in `generate`.
        rows = config.batch if num > config.batch else num
        tokens, known = (part.expand(rows, length) for part in given)
        generator = run.generator(config.seed * 1_000_003 + first)
        yield draw(run, (rows, length), tokens, known, config, generator, None)[: num - first].cpu()


def go_on(
    run: Run, prompt: str, num_tokens: int, num: int, config: SamplingConfig, *, stops: tuple[str, ...] = ()
) -> Iterator[str]:
    """`num` continuations of one prompt, each without it, up to the first of `stops` or the end of the document.

    Args:
        run: A flow or a baseline.
        prompt: Text; the end of it that fits beside a block is seen (`generation.extend`).
        num_tokens: Tokens to write.
        num: How many.
        config: How.
        stops: Strings that end a text; neither they nor what follows is part of it.

    Raises:
        UserError: Characters outside the alphabet, or a sampler that is not for this run.
    """
    ids = torch.from_numpy(encode(prompt, run.tokenizer)).to(run.device)
    for first in range(0, num, config.batch):
        rows = config.batch if num > config.batch else num
        generator = run.generator(config.seed * 1_000_003 + first)
        new = extend(run, ids.expand(rows, len(ids)), num_tokens, config, generator)[: num - first]
        for row in new.cpu().numpy():
            yield cut(row, run.tokenizer, stops)


def cut(ids: Int[np.ndarray, " _"], tokenizer: Tokenizer, stops: tuple[str, ...]) -> str:
    """The text of ids up to the end of a document and the first of `stops`."""
    ends = np.flatnonzero(ids == tokenizer.eos_id) if tokenizer.eos_id is not None else []
    text = tokenizer.decode(ids[: ends[0]] if len(ends) else ids)
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]
