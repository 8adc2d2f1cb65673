"""The trunk on discrete text: nothing looks ahead where it must not, and sizes are the flow's."""

import pytest
import torch
import torch.nn.functional as F
from exact_tokens import token_network
from oracle import seeded

from catmaps.baselines.families import FAMILIES
from catmaps.flow import times
from catmaps.model import build_baseline, build_network
from catmaps.network import trunk
from catmaps.network.denoiser import NetworkConfig, uniform_log_prior
from catmaps.network.tokens import TokenNetwork
from catmaps.network.trunk import Neighbours


def change_of(net: TokenNetwork) -> torch.Tensor:
    """Which logits differ, (L,), when the tokens from the fifth on do."""
    tokens = torch.randint(6, (3, 9), generator=seeded(0))
    other = tokens.clone()
    other[:, 4:] = (tokens[:, 4:] + 1 + torch.randint(4, (3, 5), generator=seeded(1))) % 6
    t = torch.full((3, 1), 0.3).double()
    return (net(tokens, t) - net(other, t)).abs().amax((0, 2))


@pytest.mark.parametrize("causal", [False, True])
def test_neighbours_are_a_depthwise_convolution(causal: bool) -> None:
    near = Neighbours(4, 2, causal).double()
    y = torch.randn(3, 7, 4, dtype=torch.float64, generator=seeded(0))
    torch.testing.assert_close(near(y), y)
    near.weight.data.normal_(generator=seeded(1))
    padded = F.pad(y.mT, (2, 0 if causal else 2))
    expected = y + F.conv1d(padded, near.weight.mT[:, None], groups=4).mT
    torch.testing.assert_close(near(y), expected)  # with gradients, and without
    with torch.no_grad():
        torch.testing.assert_close(near(y), expected)
        torch.testing.assert_close(near(y[:, :1]), near.float()(y[:, :1].float()).double())


@pytest.mark.parametrize("dense_length", [trunk.DENSE_LENGTH, 0], ids=["products", "fused"])
def test_a_causal_network_does_not_see_later_tokens(dense_length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "DENSE_LENGTH", dense_length)
    change = change_of(token_network(6, causal=True))
    assert change[:4].max() < 1e-12
    assert change[4:].min() > 1e-3
    assert change_of(token_network(6)).min() > 1e-6


def test_both_ways_of_causal_attention_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, 2, 7, 4, generator=seeded(0), dtype=torch.float64)
    dense = trunk.attention(q, k, v, causal=True)
    monkeypatch.setattr(trunk, "DENSE_LENGTH", 0)
    torch.testing.assert_close(trunk.attention(q, k, v, causal=True), dense)


def test_a_prefix_has_the_logits_of_its_text() -> None:
    net, t = token_network(6, special=1, causal=True), torch.zeros(2, 1)
    tokens = torch.randint(7, (2, 8), generator=seeded(0))
    torch.testing.assert_close(net(tokens[:, :5], t), net(tokens, t)[:, :5])


def test_time_is_seen() -> None:
    net, tokens = token_network(6), torch.zeros(2, 5, dtype=torch.long)
    logits = net(tokens, torch.tensor([[0.2], [0.7]]).double())
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_causal_trunk_refuses_tangents() -> None:
    block = trunk.Block(8, 2, 4, 2, causal=True)
    x, condition = torch.zeros(1, 3, 8), torch.zeros(1, 1, 4)
    with pytest.raises(AssertionError):
        block.with_tangent((x, x), (condition, condition), None, trunk.rope_waves(3, 4))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vocab_size", [27, 4096])
def test_parameters_are_those_of_the_flow_within_two_percent(family: str, vocab_size: int) -> None:
    config = NetworkConfig(width=64, blocks=2, heads=2)
    flow = build_network(config, uniform_log_prior(vocab_size)).num_parameters()
    ours = build_baseline(FAMILIES[family], config, uniform_log_prior(vocab_size)).num_parameters()
    assert ours[0] == pytest.approx(flow[0], rel=0.02)
    assert sum(ours) == pytest.approx(sum(flow), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_network_says_the_unigram(family: str) -> None:
    prior = torch.tensor([0.5, 0.3, 0.2]).log()
    net = build_baseline(FAMILIES[family], NetworkConfig(width=16, blocks=1, heads=2), prior)
    logits = net(torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 1))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, prior.expand(2, 4, 3))
    assert torch.equal(net.features.clock_table, times.uniform().table.float())  # pyright: ignore
