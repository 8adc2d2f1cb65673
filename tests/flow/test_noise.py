"""Counter-based noise: the published generator, its independence of how work is dealt, its law, and its projection."""

import math

import pytest
import torch
from torch import Tensor

from catmaps.flow.noise import Noise, RowStreams, normals, philox, uniforms
from catmaps.tiles import Projection, split

Z = torch.zeros((), dtype=torch.int64)
ONES = torch.tensor(0xFFFFFFFF)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (Z, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ONES, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_gives_the_published_words(word: Tensor, expected: list[int]) -> None:
    assert [int(w) for w in philox((word, word, word, word), (word, word))] == expected


def test_noise_does_not_depend_on_how_samples_are_dealt() -> None:
    index, order = torch.tensor([0, 1, 2, 7, 1000, 2**40]), torch.tensor([3, 5, 0, 4, 2, 1])
    whole = Noise.of((5, 11), index, 4, 6)
    parts = [Noise.of((5, 11), part, 4, 6).x for part in index[order].tensor_split([1, 4])]
    assert torch.equal(torch.cat(parts), whole.x[order])
    assert torch.equal(whole[order].x, whole.x[order])
    tiles = [tile(whole).x for tile in split(6, 4, 6, 30)]
    assert len(tiles) > 2
    assert torch.equal(torch.cat(tiles, 1).view(6, 4, 6), whole.x)


def test_noise_is_distinct_per_seed_step_sample_and_stream() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (1, 2), (2**40, 3)]
    rows = torch.cat([Noise.of(key, torch.arange(30), 8, 8, stream).x for key in keys for stream in (0, 1)]).flatten(1)
    correlation = torch.corrcoef(rows.double()).fill_diagonal_(0)
    # 88,000 pairs of 64 normals: the largest |correlation| of independent rows is near 0.55.
    assert correlation.abs().max().item() < 0.68
    # Neighbouring counters must not be one stream read at two offsets: a value then recurs in another row.
    assert rows.numel() - len(rows.flatten().unique()) < 40


def test_noise_is_standard_normal() -> None:
    noise = Noise.of((1, 2), torch.arange(60), 64, 65).x.double().flatten()
    n = len(noise)
    assert abs(noise.mean().item()) < 5 / math.sqrt(n)
    assert noise.square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    assert noise.pow(3).mean().item() == pytest.approx(0, abs=5 * math.sqrt(15 / n))
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=5 * math.sqrt(96 / n))
    for edge in (-2.0, 0.0, 1.0):
        p = 0.5 * (1 + math.erf(edge / math.sqrt(2)))
        share = (noise < edge).double().mean().item()
        assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))


def test_words_of_one_counter_are_not_correlated() -> None:
    rows = normals((3, 4), torch.arange(20_000)[:, None], torch.zeros(20_000, 1, dtype=torch.int64), 8)[:, 0].double()
    correlation = torch.corrcoef(rows.T).fill_diagonal_(0)
    squares = torch.corrcoef(rows.square().T).fill_diagonal_(0)
    assert max(correlation.abs().max().item(), squares.abs().max().item()) < 5 / math.sqrt(20_000)


def test_projected_noise_has_the_law_of_the_projection() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    projection = Projection(weight, torch.linalg.cholesky(weight @ weight.T), weight)
    noise = Noise.of((1, 1), torch.arange(4000), 8, 40)
    exact = weight.double() @ weight.double().T
    for drawn in (noise.project(projection), noise.x @ weight.T):
        rows = drawn.flatten(0, 1).double()
        assert (rows.T @ rows / len(rows) - exact).norm().item() < 0.03 * exact.norm().item()
        assert rows.mean(0).abs().max().item() < 5 * exact.diagonal().max().sqrt().item() / math.sqrt(len(rows))


# ---- streams by row


def test_a_row_is_dealt_the_same_whatever_stands_beside_it() -> None:
    crowd, alone = RowStreams(torch.tensor([5, 2**43, 7])), RowStreams(torch.tensor([2**43]))
    for _ in range(3):
        assert torch.equal(crowd.noise(4, 6).x[1:2], alone.noise(4, 6).x)
        assert torch.equal(crowd.uniform(9)[1:2], alone.uniform(9))


def test_deals_rows_and_positions_are_distinct() -> None:
    streams = RowStreams(torch.arange(50))
    first, second = streams.uniform(40), streams.uniform(40)
    assert len(torch.stack([first, second]).unique()) == 2 * 50 * 40
    noises = torch.stack([streams.noise(8, 8).x.flatten() for _ in range(2)])
    assert abs(torch.corrcoef(noises)[0, 1].item()) < 5 / math.sqrt(noises.shape[1])


def test_uniforms_are_uniform() -> None:
    index = torch.arange(400)[:, None].expand(-1, 250)
    drawn = uniforms((0, 3), index, torch.arange(250).expand(400, -1))
    assert drawn.dtype == torch.float64
    assert ((drawn >= 0) & (drawn < 1)).all()
    counts = torch.histc(drawn, 20, 0, 1)
    # chi-squared of 19 degrees of freedom exceeds 50 once in 7,000
    assert ((counts - 5000).square() / 5000).sum().item() < 50
    rest = (drawn * 2**30).frac()  # the bits below a float's are as random
    assert ((torch.histc(rest, 20, 0, 1) - 5000).square() / 5000).sum().item() < 50
