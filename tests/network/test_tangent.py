"""(value, tangent) maps, elementary ones and the whole network, against torch.func.jvp."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_network import F64, KINDS, MODES, B, L, V, normals, outputs, times_of, trained, twins, used
from torch import Tensor, nn

from catmaps.network import denoiser, tangent, trunk

# The first use of torch.func.jvp in a process makes torch load its own scripted decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def same_as_jvp(pair: tuple[Tensor, Tensor], f: Callable[..., Tensor], x: object, dx: object) -> None:
    assert isinstance(x, tuple)
    assert isinstance(dx, tuple)
    torch.testing.assert_close(pair, torch.func.jvp(f, x, dx), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=bias).double()
    x, dx = normals(2, 2, 4, 5)
    same_as_jvp(tangent.linear(layer, x, dx), layer, (x,), (dx,))


def test_linear_runs_its_layer_once_so_hooks_see_it() -> None:
    torch.manual_seed(0)
    layer, calls = nn.Linear(5, 3), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    tangent.linear(layer, torch.ones(2, 5), torch.ones(2, 5))
    assert len(calls) == 1


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(weighted: bool) -> None:
    x, dx = normals(2, 2, 4, 6)
    weight = normals(6, seed=1) if weighted else None
    same_as_jvp(tangent.rms_norm(x, dx, weight, 1e-6), lambda x: F.rms_norm(x, (6,), weight, 1e-6), (x,), (dx,))


def test_rms_norm_is_computed_in_single_precision_inside() -> None:
    x, dx = normals(2, 4, 64).bfloat16()
    y, dy = tangent.rms_norm(x, dx, None, 1e-6)
    exact, dexact = tangent.rms_norm(x.double(), dx.double(), None, 1e-6)
    assert y.dtype == dy.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=0)
    torch.testing.assert_close(dy.double(), dexact, rtol=2**-8, atol=1e-6)


def test_activations() -> None:
    x, dx = normals(2, 3, 7)
    same_as_jvp(tangent.silu(x, dx), F.silu, (x,), (dx,))
    same_as_jvp(tangent.squared_relu(x, dx), lambda x: F.relu(x).square(), (x,), (dx,))


def test_softmax_also_where_it_is_saturated() -> None:
    z, dz = normals(2, 3, 7)
    z[0, 0] = 800.0
    same_as_jvp(tangent.softmax(z, dz), lambda z: z.softmax(-1), (z,), (dz,))
    assert torch.equal(tangent.softmax(z, dz)[1][0], torch.zeros(7, dtype=F64))


def test_attention() -> None:
    qkv, dqkv = (normals(3, 2, 2, 5, 4, seed=seed).unbind(0) for seed in (0, 1))
    q, k, v = qkv
    dq, dk, dv = dqkv
    same_as_jvp(tangent.attention((q, k, v), (dq, dk, dv)), trunk.attention, (q, k, v), (dq, dk, dv))


def test_attention_agrees_with_the_library_in_every_precision() -> None:
    q, k, v = normals(3, 2, 2, 5, 4)
    expected = F.scaled_dot_product_attention(q, k, v)
    for dtype, tolerance in ((F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        low = q.to(dtype), k.to(dtype), v.to(dtype)
        ours, (twin, rate) = trunk.attention(*low), tangent.attention(low, low)
        assert ours.dtype == twin.dtype == rate.dtype == dtype
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(twin.double(), expected, rtol=tolerance, atol=tolerance)


def test_attention_beyond_the_dense_length_is_the_same_function() -> None:
    q, k, v = normals(3, 1, 1, trunk.DENSE_LENGTH + 1, 4)
    expected = tangent.attention((q, k, v), (q, k, v))[0]
    torch.testing.assert_close(trunk.attention(q, k, v), expected, rtol=1e-10, atol=1e-12)


def test_modulation_and_gates() -> None:
    x, y, shift, scale = normals(4, 2, 4, 6)
    dx, dy, dshift, dscale = normals(4, 2, 4, 6, seed=1)
    same_as_jvp(
        trunk.modulated(x, dx, (shift, dshift), (scale, dscale)),
        lambda x, shift, scale: F.rms_norm(x, (6,), eps=trunk.EPS) * (1 + scale) + shift,
        (x, shift, scale),
        (dx, dshift, dscale),
    )
    same_as_jvp(
        trunk.gated(x, dx, (scale, dscale), (y, dy)),
        lambda x, gate, y: x + (1 + gate) * y,
        (x, scale, y),
        (dx, dscale, dy),
    )


def test_rotary_scores_depend_on_distance_alone() -> None:
    wave = trunk.rope_waves(32, 8, dtype=F64)
    q, k = normals(2, 1, 1, 1, 8).expand(-1, -1, -1, 32, -1)
    score = (trunk.rotate(q, wave) @ trunk.rotate(k, wave).mT)[0, 0]
    for distance in (-5, 0, 3):
        diagonal = score.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(trunk.rotate(q, wave).norm(dim=-1), q.norm(dim=-1), rtol=1e-12, atol=0)
    assert trunk.rope_waves(32, 8).dtype == torch.float32
    torch.testing.assert_close(trunk.rope_waves(32, 8).double(), wave, rtol=0, atol=1e-5)


def test_select_deals_each_position_its_own_value() -> None:
    for k in (2, 4):
        values = normals(3, k, 5)
        index = torch.randint(k, (3, 6), generator=torch.Generator().manual_seed(2))
        expected = torch.stack([values[b, index[b]] for b in range(3)])
        assert torch.equal(trunk.select(values, index), expected)
    one = normals(3, 1, 5)
    assert trunk.select(one, None) is one


@pytest.mark.parametrize(("mode", "skip"), MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moves", [True, False], ids=["moving", "held"])
def test_tangents_are_derivatives(mode: str, skip: bool, kind: str, moves: bool) -> None:
    net, x, dx = trained(input=mode, skip=skip), normals(B, L, V), normals(B, L, V, seed=1)
    at, rates = times_of(kind)
    ours = twins(net, x, at, rates, dx if moves else None)
    direction = (dx if moves else torch.zeros_like(x), *rates)
    expected = torch.func.jvp(lambda x, s, t: outputs(net, x, s, t), (x, *at), direction)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours[0], outputs(net, x, *at), rtol=1e-11, atol=1e-11)


def test_equal_times_with_unequal_tangents_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = trained(), normals(B, L, V)
    (s, t), _ = times_of("prompt")
    rates = normals(B, L), normals(B, L, seed=1)
    ours = twins(net, x, (s, t), rates, None)

    def every_position(*wide: Tensor) -> tuple[list[Tensor], Tensor]:
        return [time.expand(B, L) for time in wide], torch.arange(L).expand(B, L)

    monkeypatch.setattr(denoiser, "distinct", every_position)
    expected = torch.func.jvp(lambda s, t: outputs(net, x, s, t), (s, t), rates)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["belief", "linear"])
def test_gradients_through_the_tangents(mode: str) -> None:
    net, x, dx = trained(input=mode), normals(B, L, V), normals(B, L, V, seed=1)
    at, rates = times_of("prompt")
    weights = [normals(B, L, n, seed=seed) for n, seed in ((16, 2), (V, 3), (16, 4), (V, 5))]

    def gradients(pair: Any) -> list[Tensor]:
        net.zero_grad()
        parts = (*pair[0], *pair[1])
        sum(((w * y).sum() for w, y in zip(weights, parts, strict=True)), torch.zeros(())).backward()
        assert all(p.grad is not None for name, p in net.named_parameters() if used(name, mode))
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]

    ours = gradients(twins(net, x, at, rates, dx))
    f = torch.func.jvp(lambda x, s, t: outputs(net, x, s, t), (x, *at), (dx, *rates))
    torch.testing.assert_close(ours, gradients(f), rtol=1e-9, atol=1e-9)
