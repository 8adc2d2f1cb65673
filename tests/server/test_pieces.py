"""Windows in batches: a text does not depend on the rows beside it, given text stays, drafts end in the text."""

from pathlib import Path

import numpy as np
import pytest

from catmaps.flow.samplers import SAMPLERS
from catmaps.generation import next_window
from catmaps.model import Run, load_run
from catmaps.server.pieces import Abandoned, Draft, Piece, Settings, draw_pieces, most_rows, padded, stream_of

L = 16
PLAIN = Settings("renoise", 3, 1.0, 1.0)


@pytest.fixture(scope="module")
def map_(map_run: Path) -> Run:
    return load_run(map_run)


def piece(stream: int, settings: Settings = PLAIN, known: int = 0) -> Piece:
    return Piece(np.arange(L) % 27, np.arange(L) < known, settings, stream)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_text_is_the_same_alone_and_in_a_crowd(sampler: str, map_: Run) -> None:
    settings = PLAIN._replace(sampler=sampler)
    crowd = draw_pieces(map_, [piece(stream_of(seed), settings) for seed in range(70)])
    assert len({text.tobytes() for text in crowd}) > 60
    for seed in (0, 3, 69):
        (alone,) = draw_pieces(map_, [piece(stream_of(seed), settings)])
        assert np.array_equal(alone, crowd[seed])


def test_given_text_stays_and_may_differ_by_row(map_: Run) -> None:
    pieces = [piece(i, known=i) for i in (3, 8, 15)]
    for row, text in zip(pieces, draw_pieces(map_, pieces), strict=True):
        assert np.array_equal(text[row.known], row.tokens[row.known])


def test_top_p_and_temperature_reach_the_sampler(map_: Run) -> None:
    plain, cold, narrow = (
        draw_pieces(map_, [piece(5, PLAIN._replace(**change))])[0].tolist()
        for change in ({}, {"temperature": 1e-3}, {"top_p": 0.1})
    )
    assert plain != cold
    assert plain != narrow


def test_the_last_draft_is_the_text(map_: Run) -> None:
    drafts: list[Draft] = []
    watched = piece(1, known=4)
    watched.top, watched.on_step = 3, drafts.append
    (text,) = draw_pieces(map_, [watched])
    assert [draft.ids.shape for draft in drafts] == [(L, 3)] * 3
    assert drafts[-1].t == 1
    assert np.array_equal(drafts[-1].ids[:, 0], text)
    for draft in drafts:
        assert (np.diff(draft.probabilities) <= 0).all()
        assert np.array_equal(draft.ids[:4, 0], watched.tokens[:4])
        assert (draft.probabilities[:4, 0] == 1).all()


def test_what_nobody_waits_for_is_not_drawn_to_the_end(map_: Run) -> None:
    steps: list[Draft] = []
    left = piece(1)

    def leave(draft: Draft) -> None:
        steps.append(draft)
        left.abandoned = True

    left.on_step = leave
    with pytest.raises(Abandoned):
        draw_pieces(map_, [left])
    assert len(steps) == 1


def test_streams_tell_seeds_and_places_apart() -> None:
    places = {stream_of(seed, *place) for seed in range(-20, 20) for place in ((), (0,), (0, 0), (1, 0), (0, 1), (10,))}
    assert len(places) == 240
    assert all(0 <= place < 2**44 for place in places)
    assert stream_of(7, 0, 1) == stream_of(7, 0, 1)


def test_near_lengths_become_one() -> None:
    sizes = {n: len(padded(np.zeros(n, dtype=np.int64), np.ones(n, dtype=bool), 128)[0]) for n in (1, 16, 17, 120, 128)}
    assert sizes == {1: 16, 16: 16, 17: 32, 120: 128, 128: 128}
    tokens, known = padded(np.arange(1, 4), np.array([True, False, True]), 16)
    assert (tokens.tolist(), known.tolist()) == ([1, 2, 3, 0], [True, False, True, False])
    assert len(padded(np.arange(5), np.ones(5, dtype=bool), 5)[0]) == 5


def test_watched_batches_are_bounded_by_their_probabilities(map_: Run) -> None:
    watched = piece(0)
    assert most_rows(watched, map_, 32) == 32
    watched.on_step = print
    assert most_rows(watched, map_, 32) == 32
    assert most_rows(watched, map_, 10**6) == 2**25 // (L * 27)


@pytest.mark.parametrize(("have", "rest"), [(0, 5), (0, 40), (3, 13), (3, 14), (100, 4), (100, 40)])
def test_windows_go_on_to_the_end(have: int, rest: int) -> None:
    while rest:
        context, window = next_window(have, rest, L)
        new = window - context
        assert 0 <= context <= have
        assert new <= rest
        assert window <= L
        assert new >= min(rest, L // 2)
        have, rest = have + new, rest - new


def test_pieces_agree_in_what_a_batch_must_share() -> None:
    assert piece(1).key == piece(2).key
    keys = {piece(1).key, piece(1, known=2).key, piece(1, PLAIN._replace(steps=4)).key}
    assert len(keys) == 3
