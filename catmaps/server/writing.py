"""Carries out a request: windows into the queue, texts out of it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int

from catmaps.generation import next_window
from catmaps.infill import cut
from catmaps.model import Run
from catmaps.scoring import windows_of
from catmaps.server.asks import Ask, Order
from catmaps.server.batching import Batcher, Done, Scored, Shares, Work
from catmaps.server.pieces import Draft, Ids, Piece, padded, stream_of
from catmaps.text.tokenizers import Tokenizer

T = TypeVar("T")


class Window(NamedTuple):
    """A window as it was written."""

    tokens: Int[np.ndarray, "l"]
    known: Bool[np.ndarray, "l"]


@dataclass
class Written:
    """A text as it came about."""

    ids: Ids
    """Of the answer, before stop strings."""
    windows: list[Window] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    """Of the last window, if wanted."""
    seconds: float = 0.0
    """Its batches took."""
    rows: int = 0
    """The most rows of its batches."""


@dataclass(frozen=True)
class Choice:
    """An answer, one of the texts of a request."""

    index: int
    text: str
    finish: str
    ids: Ids
    """Of `text`; a stop string may leave a part of the last token out."""
    written: Written
    shares: list[Shares | None]
    """Bounds of its windows, where wanted."""


@dataclass(frozen=True)
class Step:
    """A text as a step of its sampler believes it to end."""

    index: int
    step: int
    t: float
    text: str


Tell = Callable[[Step], None]


def shortened(ids: Ids, text: str, tokenizer: Tokenizer) -> Ids:
    """The fewest first ids whose text begins with `text`."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(ids[:middle])) >= len(text):
            high = middle
        else:
            low = middle + 1
    return ids[:low]


class Writer:
    """Writes the texts of one request; whoever gives it up closes it."""

    def __init__(self, run: Run, batcher: Batcher, ask: Ask) -> None:
        self._run, self._batcher, self.ask = run, batcher, ask
        self._pieces: list[Piece] = []
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """What is not drawn yet need not be."""
        for piece in self._pieces:
            piece.abandoned = True

    async def choices(self) -> list[Choice]:
        """All texts."""
        return await _together([self._choice(*place, None) for place in self._places()])

    async def stream(self) -> AsyncIterator[Step | Choice]:
        """Steps as they are made, and each text when it is done."""
        queue: asyncio.Queue[Step | Choice | None] = asyncio.Queue()

        async def one(order: int, copy: int) -> None:
            queue.put_nowait(await self._choice(order, copy, queue.put_nowait))

        async def everything() -> None:
            try:
                await _together([one(*place) for place in self._places()])
            finally:
                queue.put_nowait(None)

        task = asyncio.create_task(everything())
        try:
            while (item := await queue.get()) is not None:
                yield item
            await task
        finally:
            task.cancel()

    def _places(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(len(self.ask.orders)) for j in range(self.ask.copies)]

    async def _choice(self, order: int, copy: int, tell: Tell | None) -> Choice:
        ask, tokenizer, asked = self.ask, self._run.tokenizer, self.ask.orders[order]
        index = order * ask.copies + copy
        if asked.known is None:
            written = await self._go_on(asked, (order, copy), _tell_from(tell, index, tokenizer))
        else:
            written = await self._fill(asked, (order, copy), _tell_from(tell, index, tokenizer))
        whole = tokenizer.decode(written.ids)
        text = whole if asked.whole else cut(written.ids, tokenizer, ask.stops)
        ids = written.ids if text == whole else shortened(written.ids, text, tokenizer)
        shares = await self._shares(asked, written, len(ids), index) if ask.logprobs else []
        return Choice(index, text, "stop" if self._ended(written.ids) else "length", ids, written, shares)

    def _ended(self, ids: Ids) -> bool:
        """Whether the end of a document or a stop string stands in an answer."""
        tokenizer = self._run.tokenizer
        if tokenizer.eos_id is not None and bool((ids == tokenizer.eos_id).any()):
            return True
        return len(cut(ids, tokenizer, self.ask.stops)) < len(tokenizer.decode(ids))

    async def _go_on(self, order: Order, place: tuple[int, int], tell: "Told | None") -> Written:
        """As `generation.extend`, a window at a time, until a stop string."""
        text, written, wanted = order.tokens, Written(order.tokens[:0]), len(order.tokens) + order.more
        while (rest := wanted - len(text)) > 0:
            context, length = next_window(len(text), rest, self._run.config.data.length)
            tokens = np.pad(text[len(text) - context :], (0, length - context))
            window = Window(tokens, np.arange(length) < context)
            shown = None if tell is None else tell.after(written.ids, slice(context, length))
            ids = await self._window(window, (*place, len(written.windows)), written, shown)
            text = np.concatenate([text, ids[context:]])
            written.ids = text[len(order.tokens) :]
            if self._ended(written.ids):
                break
        return written

    async def _fill(self, order: Order, place: tuple[int, int], tell: "Told | None") -> Written:
        assert order.known is not None
        written = Written(order.tokens[:0])
        shown = None if tell is None else tell.after(written.ids, order.shown)
        ids = await self._window(Window(order.tokens, order.known), (*place, 0), written, shown)
        written.ids = ids[order.shown]
        return written

    async def _window(
        self, window: Window, place: tuple[int, int, int], written: Written, shown: "Callable[[Draft], None] | None"
    ) -> Ids:
        """Draws a window and puts it on record."""
        tokens, known = padded(window.tokens, window.known, self._run.config.data.length)
        piece = Piece(tokens, known, self.ask.settings, stream_of(self.ask.seed, *place))
        if self.ask.trajectory is not None:
            piece.top, piece.on_step = self.ask.trajectory, written.drafts.append
        elif shown is not None:
            piece.on_step = lambda draft: _quietly(self._loop, shown, draft)
        done = await self._submit(piece)
        assert done.ids is not None
        ids = done.ids[: len(window.tokens)]
        written.windows.append(Window(ids, window.known))
        written.seconds += done.seconds
        written.rows = max(written.rows, done.rows)
        return ids

    async def _submit(self, work: Work) -> Done:
        self._pieces.append(work.piece if isinstance(work, Scored) else work)
        return await asyncio.wrap_future(self._batcher.submit(work))

    async def _shares(self, order: Order, written: Written, kept: int, index: int) -> list[Shares | None]:
        """The bound of each window, given what was given there; of the `kept` first tokens of an answer."""
        windows = written.windows
        if not windows:  # the prompt itself is scored
            pieces = windows_of(order.tokens, self._run.config.data.length)
            windows = [Window(piece.tokens.numpy(), np.zeros(len(piece.tokens), dtype=bool)) for piece in pieces]
        elif order.known is None:
            windows = _first(windows, kept)
        shares: list[Shares | None] = []
        for i, window in enumerate(windows):
            piece = Piece(window.tokens, window.known, self.ask.settings, 0)
            done = await self._submit(Scored(piece, stream_of(self.ask.seed, index, i, 1)))
            shares.append(done.shares)
        written.windows = windows
        return shares


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of all, or the first error, with which the others end."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _first(windows: list[Window], kept: int) -> list[Window]:
    """Windows with their first `kept` new tokens in all."""
    found = []
    for tokens, known in windows:
        new = int((~known).sum())
        if (share := min(new, kept)) > 0:
            length = len(tokens) - new + share
            found.append(Window(tokens[:length], known[:length]))
        kept -= share
    return found


def _quietly(loop: asyncio.AbstractEventLoop, call: Callable[[Draft], None], draft: Draft) -> None:
    """Calls in the loop's thread, if the loop still runs."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(call, draft)


@dataclass
class Told:
    """Makes steps of drafts."""

    tell: Tell
    index: int
    tokenizer: Tokenizer
    steps: int = 0

    def after(self, ids: Ids, shown: slice) -> Callable[[Draft], None]:
        """Hears the drafts of a window; the text is what stands before it and the window's new part."""

        def told(draft: Draft) -> None:
            self.steps += 1
            text = self.tokenizer.decode(np.concatenate([ids, draft.ids[shown, 0]]))
            self.tell(Step(self.index, self.steps, draft.t, text))

        return told


def _tell_from(tell: Tell | None, index: int, tokenizer: Tokenizer) -> Told | None:
    return None if tell is None else Told(tell, index, tokenizer)
