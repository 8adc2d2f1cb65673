"""The queue: who shares a batch, whose turn it is, and what becomes of faults and of those who leave."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from catmaps.model import Run, load_run
from catmaps.scoring import bound_given
from catmaps.server import batching
from catmaps.server.batching import Batcher, Done, Scored
from catmaps.server.pieces import Ids, Piece, Settings, stream_of

L = 16
PLAIN = Settings("renoise", 2, 1.0, 1.0)


class Seen:
    """Remembers batches."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def batch(self, rows: int, calls: int, seconds: float) -> None:
        assert calls > 0
        assert seconds > 0
        self.rows.append(rows)


@pytest.fixture(scope="module")
def map_(map_run: Path) -> Run:
    return load_run(map_run)


def piece(seed: int, **change: float) -> Piece:
    settings = PLAIN._replace(**change)  # pyright: ignore[reportArgumentType]
    return Piece(np.zeros(L, dtype=np.int64), np.zeros(L, dtype=bool), settings, stream_of(seed))


def results(batcher: Batcher, works: list[Piece]) -> list[Done]:
    return [done.result(20) for done in [batcher.submit(work) for work in works]]


def test_texts_do_not_depend_on_workers_or_company(map_: Run) -> None:
    def texts(workers: int, rows: int) -> list[bytes]:
        batcher = Batcher(map_, workers=workers, rows=rows, observe=Seen().batch)
        found = results(batcher, [piece(i, temperature=1.0 + i % 2) for i in range(40)])
        batcher.close()
        return [done.ids.tobytes() for done in found if done.ids is not None]

    assert texts(1, 1) == texts(2, 32) == texts(1, 7)


def test_what_comes_together_is_drawn_together_up_to_the_most(map_: Run) -> None:
    seen = Seen()
    batcher = Batcher(map_, workers=1, rows=24, observe=seen.batch)
    found = results(batcher, [piece(i) for i in range(60)])
    batcher.close()
    assert sum(seen.rows) == 60
    assert max(seen.rows) == 24
    assert len(seen.rows) <= 5
    assert {done.rows for done in found} == set(seen.rows)


def test_other_settings_make_another_batch(map_: Run) -> None:
    seen = Seen()
    batcher = Batcher(map_, workers=1, rows=32, observe=seen.batch)
    results(batcher, [piece(i, steps=1 + i % 3) for i in range(12)])
    batcher.close()
    assert len(seen.rows) >= 3


def test_those_who_left_are_not_drawn(map_: Run) -> None:
    seen = Seen()
    batcher = Batcher(map_, workers=1, rows=8, observe=seen.batch)
    works = [piece(i) for i in range(10)]
    for work in works[:5]:
        work.abandoned = True
    done = [batcher.submit(work) for work in works]
    cancelled = batcher.submit(piece(99))
    cancelled.cancel()
    assert all(future.result(20) for future in done[5:])
    batcher.close()
    assert sum(seen.rows) in (5, 6)  # the cancelled one may have been begun


def test_a_fault_is_told_and_the_thread_goes_on(map_: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_pieces = batching.draw_pieces

    def failing(run: Run, pieces: list[Piece]) -> list[Ids]:
        if pieces[0].settings.steps == 7:
            raise ArithmeticError("no")
        return draw_pieces(run, pieces)

    monkeypatch.setattr(batching, "draw_pieces", failing)
    batcher = Batcher(map_, workers=1, rows=8, observe=Seen().batch)
    with pytest.raises(ArithmeticError):
        batcher.submit(piece(0, steps=7)).result(20)
    assert batcher.submit(piece(0)).result(20).ids is not None
    batcher.close()


def test_closing_finishes_what_waits_and_takes_no_more(map_: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, draw_pieces = threading.Event(), batching.draw_pieces

    def slow(run: Run, pieces: list[Piece]) -> list[Ids]:
        begun.set()
        time.sleep(0.1)
        return draw_pieces(run, pieces)

    monkeypatch.setattr(batching, "draw_pieces", slow)
    batcher = Batcher(map_, workers=1, rows=1, observe=Seen().batch)
    waiting = [batcher.submit(piece(i, steps=1 + i)) for i in range(3)]
    begun.wait(20)
    batcher.close()
    assert all(done.done() and done.result().ids is not None for done in waiting)
    with pytest.raises(RuntimeError):
        batcher.submit(piece(0))


def test_a_bound_is_that_of_the_text_given_the_rest(map_: Run) -> None:
    tokens, known = np.arange(L) % 27, np.arange(L) % 3 == 0
    batcher = Batcher(map_, workers=2, rows=8, observe=Seen().batch)
    done = batcher.submit(Scored(Piece(tokens, known, PLAIN, 0), seed=3)).result(20)
    batcher.close()
    bound = bound_given(map_, torch.from_numpy(tokens)[None], torch.from_numpy(known)[None], seed=3)
    assert done.shares is not None
    assert done.shares.nats == bound.nats.item() == pytest.approx(sum(done.shares.per_token))
    assert all((share == 0) == k for share, k in zip(done.shares.per_token, known, strict=True))
