"""From texts to token ids that fit the window of a run: prompts and continuations, and the windows of a long text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from catmaps.errors import UserError
from catmaps.evaluation.conditional import Ids
from catmaps.scoring import windows_of
from catmaps.text.tokenizers import Tokenizer


class Pair(NamedTuple):
    """A prompt and its continuation; `truncated` says whether the prompt has lost its beginning."""

    prompt: Ids
    continuation: Ids
    truncated: bool


class Window(NamedTuple):
    """A piece of a long text and the clean text to its left that it is scored after."""

    prompt: Ids
    piece: Ids


@dataclass(frozen=True)
class Encoder:
    """Turns texts into what a run of window length `length` can read.

    Attributes:
        tokenizer: The run's.
        length: L, the most tokens of prompt and continuation together.
        truncate: Whether what is too long loses the beginning of its prompt; else it is refused.
    """

    tokenizer: Tokenizer
    length: int
    truncate: bool = False

    @property
    def start(self) -> Ids:
        """What stands before a text that nothing else precedes: the end of the document before it, if ids have one."""
        eos = self.tokenizer.eos_id
        return _ids([] if eos is None else [eos])

    def encode(self, text: str) -> Ids:
        return _ids(self.tokenizer.encode(text))

    def pairs(self, context: str, continuations: Sequence[str], name: str) -> list[Pair]:
        """The continuations of one context, all after the same prompt.

        Context and continuation are encoded together. The prompt is what all these encodings and that of the context
        begin with, so that the tokens are those of the whole text even where one spans the seam. An empty context is
        the end of a document where the tokenizer has one, else nothing; an empty continuation has no token.

        Args:
            context: May be empty.
            continuations: Distinct ones of one question, which lose the same tokens if they must lose some.
            name: For messages.

        Raises:
            UserError: A continuation has no token in this vocabulary, or does not fit.
        """
        if context:
            alone, wholes = self.encode(context), [self.encode(context + text) for text in continuations]
            shared = min([len(alone)] + [_common(alone, whole) for whole in wholes])
            prompt, rest = alone[:shared], [whole[shared:] for whole in wholes]
        else:
            prompt, rest = self.start, [self.encode(text) for text in continuations]
        for text, ids in zip(continuations, rest, strict=True):
            if text and not len(ids):
                raise UserError(
                    f"{name}: nothing of {text!r} can be written in the run's vocabulary ({self.tokenizer.name}), so "
                    "it cannot be scored; leave this task out or use a run with another tokenizer"
                )
        room = self.length - max(len(ids) for ids in rest)
        if not context and room == 0:
            prompt = prompt[:0]  # our own addition: no loss
        kept = self.fit(prompt, room, name)
        return [Pair(kept, ids, len(kept) < len(prompt)) for ids in rest]

    def fit(self, prompt: Ids, room: int, name: str) -> Ids:
        """The prompt, or with `truncate` as much of its end as there is room for.

        Raises:
            UserError: It does not fit and may not be cut, or there is no room for anything.
        """
        if room >= len(prompt):
            return prompt
        total = len(prompt) + self.length - room
        if room < 0:
            raise UserError(
                f"{name}: the answer alone has {self.length - room} tokens, the run reads {self.length}; leave this "
                f"task out or use a run with data.length of at least {total}"
            )
        if not self.truncate:
            raise UserError(
                f"{name}: prompt and answer have {total} tokens, the run reads {self.length}; give --truncate left to "
                f"drop the beginning of such prompts, or use a run with data.length of at least {total}"
            )
        return prompt[len(prompt) - room :]

    def windows(self, text: str) -> Iterator[Window]:
        """A text in pieces that add up to its bound by the chain rule.

        The first piece fills a window on its own (after the end of a document, where the tokenizer has one). Each
        further piece is half a window, scored after as many tokens before it as fit.
        """
        start = self.start[: self.length - 1]
        ids = np.concatenate([start, self.encode(text)])
        if len(ids) > len(start):
            for i, window in enumerate(windows_of(ids, self.length, self.length // 2)):
                known = window.known if i else len(start)
                yield Window(_ids(window.tokens[:known].numpy()), _ids(window.tokens[known:].numpy()))


def _ids(values: Sequence[int] | np.ndarray) -> Ids:
    return np.asarray(values).astype(np.int32)


def _common(one: Ids, other: Ids) -> int:
    """How many ids both begin with."""
    most = min(len(one), len(other))
    differ = np.flatnonzero(one[:most] != other[:most])
    return int(differ[0]) if len(differ) else most
