"""The written-down gradient of the cross-entropy is that of its definition."""

import pytest
import torch
from oracle import seeded
from torch import Tensor

from catmaps.flow.cross_entropy import cross_entropy
from catmaps.tiles import Readout

B, L, V = 2, 3, 11


def parts(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {"context": (B, L, V), "log_prior": (V,), "gain": (B, 1), "x": (B, L, V)}
    return {
        name: torch.randn(shape, generator=seeded(i), dtype=torch.float64).to(dtype).requires_grad_()
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("names", [("context",), ("context", "log_prior"), ("context", "log_prior", "gain", "x")])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_definition(names: tuple[str, ...], temperature: float) -> None:
    tokens, upstream = torch.randint(V, (B, L), generator=seeded(7)), torch.rand(B, L, generator=seeded(8))
    given = {name: value for name, value in parts().items() if name in names}
    now = Readout(**given, temperature=temperature)  # pyright: ignore[reportArgumentType]
    log_mu = now.logits().log_softmax(-1)
    right = log_mu.gather(-1, tokens[..., None])[..., 0]
    values, squares = cross_entropy(now, tokens)
    torch.testing.assert_close(values, -right)
    onehot = torch.nn.functional.one_hot(tokens, V)
    torch.testing.assert_close(squares, (onehot - log_mu.exp()).square().sum(-1))
    assert not squares.requires_grad
    ours = torch.autograd.grad((values * upstream).sum(), list(given.values()))
    expected = torch.autograd.grad((-right * upstream).sum(), list(given.values()))
    torch.testing.assert_close(ours, expected)


def test_a_token_that_is_nearly_certain_keeps_its_gradient_in_bf16() -> None:
    context = torch.zeros(1, 1, V, dtype=torch.bfloat16)
    context[..., 4] = 14.0
    context.requires_grad_()
    values, _ = cross_entropy(Readout(context), torch.tensor([[4]]))
    (gradient,) = torch.autograd.grad(values.sum(), context)
    missing = 1 - context.detach().double().softmax(-1)[0, 0, 4].item()
    assert gradient[0, 0, 4].item() == pytest.approx(-missing, rel=0.01)
    assert gradient.float().sum().item() == pytest.approx(0, abs=0.01 * missing)
