"""The whole network: its invariances, its start, its precisions. (Its tangents: test_tangent.py.)"""

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from small_network import F64, KINDS, MODES, B, L, V, fresh, normals, outputs, times_of, trained, twins, used
from torch import Tensor

from catmaps.flow.evidence import bayes_gain
from catmaps.flow.interpolant import interpolate
from catmaps.network import denoiser
from catmaps.network.denoiser import NetworkConfig, smoothed_log_prior, uniform_log_prior


@pytest.mark.parametrize("mode", ["belief", "linear"])
def test_one_time_per_sequence_equals_the_same_time_everywhere(mode: str) -> None:
    net, x = trained(input=mode), normals(B, L, V)
    at, rates = times_of("shared")
    wide_at, wide_rates = ((a.expand(B, L), b.expand(B, L)) for a, b in (at, rates))
    ours, wide = twins(net, x, at, rates, None), twins(net, x, wide_at, wide_rates, None)
    torch.testing.assert_close(ours, wide, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs(net, x, *at), outputs(net, x, *wide_at), rtol=1e-12, atol=1e-12)


def test_a_shared_start_may_meet_an_end_per_position() -> None:
    net, x = trained(), normals(B, L, V)
    s, t = torch.full((B, 1), 0.2, dtype=F64), times_of("many")[0][1] * 0.8 + 0.2
    torch.testing.assert_close(outputs(net, x, s, t), outputs(net, x, s.expand(B, L), t))
    one, ones = torch.ones(B, 1, dtype=F64), torch.ones(B, L, dtype=F64)
    wide = twins(net, x, (s.expand(B, L), t), (ones, ones), None)
    torch.testing.assert_close(twins(net, x, (s, t), (one, ones), None), wide)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_do_not_see_each_other(kind: str) -> None:
    net, x = trained(), normals(B, L, V)
    (s, t), _ = times_of(kind)
    whole = outputs(net, x, s, t)
    order = torch.tensor([2, 0, 1])
    shuffled = outputs(net, x[order], s[order], t[order])
    alone = outputs(net, x[1:2], s[1:2], t[1:2])
    for full, permuted, single in zip(whole, shuffled, alone, strict=True):
        torch.testing.assert_close(permuted, full[order], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(single, full[1:2], rtol=1e-11, atol=1e-11)


def test_positions_see_each_other_through_attention_alone() -> None:
    net, x = trained(neighbours=0), normals(B, L, V)
    (s, t), _ = times_of("many")
    changed = x.clone(), s.clone(), t.clone()
    changed[0][:, 0], changed[1][:, 0], changed[2][:, 0] = 0.5, 0.1, 0.9
    logits, seen = (outputs(net, *arguments)[1] for arguments in ((x, s, t), changed))
    assert bool(((logits - seen).abs().amax(-1) > 1e-6).all())
    for name, parameter in net.named_parameters():
        if "attention_out" in name:
            parameter.data.zero_()
    logits, seen = (outputs(net, *arguments)[1] for arguments in ((x, s, t), changed))
    torch.testing.assert_close(logits[:, 1:], seen[:, 1:], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(logits[:, 0], seen[:, 0])


def test_order_of_tokens_matters() -> None:
    net, x = trained(), normals(B, L, V)
    (s, t), _ = times_of("shared")
    reversed_logits = outputs(net, x.flip(1), s, t)[1].flip(1)
    assert not torch.allclose(reversed_logits, outputs(net, x, s, t)[1], atol=1e-4)


def test_a_base_checkpoint_is_a_valid_start_for_distillation() -> None:
    (s, t), _ = times_of("many")
    x = normals(B, L, V)
    # As base training leaves it: everything learned but the gap's last layer, which never got a gradient.
    net = trained(input="linear", skip=False)
    gap = net.get_parameter("conditioner.gap.1.weight")
    assert not torch.allclose(outputs(net, x, s, t)[1], outputs(net, x, s, s)[1])
    gap.data.zero_()
    torch.testing.assert_close(outputs(net, x, s, t), outputs(net, x, s, s), rtol=0, atol=0)
    # With gains the condition is still the diagonal's; the gains differ, on purpose.
    net = trained()
    net.get_parameter("conditioner.gap.1.weight").data.zero_()
    assert torch.equal(
        net.conditioner(net.features(s), net.features(t)), net.conditioner(net.features(s), net.features(s))
    )
    assert not torch.allclose(net.gain_in(s, t), net.gain_in(s, s))


def test_the_gap_learns_nothing_and_changes_nothing_on_the_diagonal() -> None:
    net, x = trained(), normals(B, L, V)
    (s, _), _ = times_of("many")
    before = outputs(net, x, s, s)
    before[1].square().sum().backward()
    for name, parameter in net.named_parameters():
        if ".gap." in name or name.startswith("gain_"):
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
            parameter.data.normal_(generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(outputs(net, x, s, s), before, rtol=0, atol=0)


def test_a_new_network_is_bayes_rule_on_the_unigram() -> None:
    net = fresh().double()
    tokens = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(0))
    (s, _), _ = times_of("many")
    x = interpolate(tokens, normals(B, L, V), s).x
    _, logits = outputs(net, x, s, s)
    expected = (net.log_prior + bayes_gain(s)[..., None] * x).log_softmax(-1)
    torch.testing.assert_close(logits.log_softmax(-1), expected, rtol=1e-12, atol=1e-12)


def test_new_blocks_are_the_identity() -> None:
    net, x = fresh(), normals(B, L, 16).float()
    condition = normals(B, 1, 8).float()
    wave = denoiser.Trunk(16, 1, 2, 8, 4)
    hidden = wave(x, condition, None)
    torch.testing.assert_close(hidden, F.rms_norm(x, (16,), eps=1e-6), rtol=1e-6, atol=1e-6)
    assert net.trunk(x, condition, None).shape == x.shape


def test_clean_positions_enter_as_their_tokens_row() -> None:
    net = trained()
    tokens = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(0))
    one = torch.ones(B, 1, dtype=F64)
    x = F.one_hot(tokens, V).double()
    row = net.embedding(x, net.gain_in(one, one), net.log_prior)
    torch.testing.assert_close(row, net.embedding.table.weight.T[tokens], rtol=0, atol=1e-12)


@dataclass(frozen=True)
class Step:
    """A diagonal training step's ingredients."""

    tokens: Tensor
    x: Tensor
    t: Tensor


def diagonal_step() -> Step:
    generator = torch.Generator().manual_seed(3)
    tokens, t = torch.randint(V, (B, L), generator=generator), torch.rand(B, 1, generator=generator)
    return Step(tokens, interpolate(tokens, normals(B, L, V).float(), t).x, t)


@pytest.mark.parametrize(("mode", "skip"), MODES)
def test_every_parameter_gets_a_gradient_on_the_diagonal(mode: Literal["belief", "linear"], skip: bool) -> None:
    net, step = fresh(input=mode, skip=skip), diagonal_step()
    _, logits = outputs(net, step.x, step.t, step.t)
    F.cross_entropy(logits.flatten(0, 1), step.tokens.flatten()).backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == used(name, mode, skip), name
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all()), name


@pytest.mark.parametrize("mode", ["belief", "linear"])
def test_bfloat16_stays_close_to_single_precision(mode: str) -> None:
    net, step = trained(input=mode).float(), diagonal_step()
    at, rates = (step.t, step.t), (torch.ones_like(step.t), torch.zeros_like(step.t))
    single = outputs(net, step.x, *at), twins(net, step.x, at, rates, None)
    net.precision = torch.bfloat16
    low = outputs(net, step.x, *at), twins(net, step.x, at, rates, None)
    for exact, rough in ((single[0][1], low[0][1]), (single[1][0][1], low[1][0][1])):
        assert rough.dtype == torch.float32
        assert ((rough - exact).norm() / exact.norm()).item() < 0.02
    exact, rough = single[1][1][1], low[1][1][1]
    assert rough.dtype == torch.float32
    assert ((rough - exact).norm() / exact.norm()).item() < 0.05
    low[0][1].square().mean().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for name, p in net.named_parameters() if used(name, mode)
    )


def test_double_runs_in_double_throughout() -> None:
    net = trained()
    (s, t), rates = times_of("prompt")
    x = normals(B, L, V)
    for pair in (outputs(net, x, s, t), *twins(net, x, (s, t), rates, None)):
        assert all(y.dtype == F64 for y in pair)
    single = outputs(trained().float(), x.float(), s.float(), t.float())
    for exact, rough in zip(outputs(net, x, s, t), single, strict=True):
        error = (rough.double() - exact).abs().max().item()
        assert 1e-9 < error < 1e-3


def test_parameters_are_counted_apart() -> None:
    net = fresh()
    body, vocabulary = net.num_parameters()
    assert net.vocab_size == V
    assert vocabulary == 2 * V * 16
    assert body + vocabulary == sum(p.numel() for p in net.parameters())
    blocks, features = 2, net.features.size
    block = 16 * 48 + 16 * 16 + 2 * 16 * 64 + 2 * 8 + (8 + 1) * 96 + 2 * 5 * 16
    gains = 2 * (2 * 16 + 16 + 16 + 2)
    time = (features + 1) * 8 + (8 + 1) * 8 + features * 8 + 8 * 8
    assert body == blocks * block + (8 + 1) * 32 + gains + time


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30, "heads": 4}, "width 30"),
        ({"width": 12, "heads": 4}, "even number"),
        ({"heads": 0}, "at least 1"),
        ({"width": 0}, "at least 1"),
        ({"blocks": 0}, "at least 1"),
        ({"conditioning": 0}, "at least 1"),
        ({"mlp_ratio": -1}, "at least 1"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**changes)  # pyright: ignore[reportArgumentType]


def test_log_priors_are_distributions_without_zeros() -> None:
    prior = smoothed_log_prior(torch.tensor([0.0, 10.0, 89.5]))
    torch.testing.assert_close(prior.exp(), torch.tensor([0.5, 10.5, 90.0]) / 101)
    assert uniform_log_prior(8).logsumexp(0).item() == pytest.approx(0, abs=1e-6)


def test_state_dict_round_trip_is_exact() -> None:
    net, other = trained(), fresh().double()
    other.load_state_dict(net.state_dict())
    (s, t), _ = times_of("many")
    x = normals(B, L, V)
    torch.testing.assert_close(outputs(other, x, s, t), outputs(net, x, s, t), rtol=0, atol=0)
