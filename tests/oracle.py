"""Exact models of small joints, as denoisers in fp64: what the tests hold the mathematics against.

An `Oracle` gives log mu_{s,t}(x) in closed form (or to integration error); its tangents come from `torch.func.jvp`.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.flow.interpolant import AnyState, State, interpolate
from catmaps.tiles import MovingReadout, Readout
from catmaps.weights import Weight

CLEAN_GAIN = 1e3  # log-odds of a clean position: exp(-1000) is 0 in fp64, and no infinity meets a zero
U_MAX = 12.0  # where the exact flow ends: a token is undecided there with probability below 1e-12


def jvp(function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """`torch.func.jvp`, silent about torch's own use of the deprecated torch.jit.script in its forward mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        value, rate = torch.func.jvp(function, primals, tangents)[:2]
    return value, rate


class Oracle(ABC):
    """A denoiser that is given by its log endpoints; hidden vectors are these log endpoints."""

    vocab_size: int
    tile = 2**24
    projects = False

    @abstractmethod
    def log_endpoint(
        self, x: Float[Tensor, "b l v"], s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]
    ) -> Float[Tensor, "b l v"]:
        """log mu_{s,t}(x), normalised or not."""

    def encode(self, state: AnyState, s: Tensor, t: Tensor) -> Tensor:
        return self.log_endpoint(state.x, s, t)

    def encode_with_tangent(
        self, state: AnyState, s: Tensor, t: Tensor, ds: Tensor, dt: Tensor, dx: AnyState | None = None
    ) -> tuple[Tensor, Tensor]:
        direction = torch.zeros_like(state.x) if dx is None else dx.x
        return jvp(self.log_endpoint, (state.x, s, t), (direction, ds, dt))

    def readout(self, hidden: Tensor, state: AnyState, s: Tensor, t: Tensor) -> Readout:
        return Readout(hidden)

    def readout_with_tangent(
        self,
        hidden: tuple[Tensor, Tensor],
        state: AnyState,
        times: tuple[Tensor, Tensor, Tensor, Tensor],
        dx: AnyState | None = None,
    ) -> MovingReadout:
        return MovingReadout(Readout(hidden[0]), Readout(hidden[1]))

    def readout_weights(self) -> AbstractContextManager[list[Weight]]:
        return nullcontext([])


class ExactModel(Oracle):
    """The diagonal mu_{s,s} of a known law of texts (B, L); it ignores t. Positions at s = 1 are clean."""

    length: int

    @abstractmethod
    def log_marginals(self, evidence: Float[Tensor, "b l v"]) -> Float[Tensor, "b l v"]:
        """log sum over the texts with token k at position l of p(text) exp(sum over positions of their evidence)."""

    @abstractmethod
    def entropy(self) -> float:
        """Nats per text."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Int[Tensor, "n l"]: ...

    def log_endpoint(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Bayes' rule: a noisy one-hot is worth s / (1 - s)^2 x nats to each token."""
        clean = s >= 1
        gain = torch.where(clean, CLEAN_GAIN, s / torch.where(clean, 1.0, 1 - s).square())
        return self.log_marginals(gain[..., None] * x).log_softmax(-1)

    def log_partition(self, evidence: Float[Tensor, "b l v"]) -> Float[Tensor, "b"]:
        """log sum over all texts of p(text) exp(evidence)."""
        return self.log_marginals(evidence)[:, 0].logsumexp(-1)

    def log_prob(self, tokens: Int[Tensor, "b l"], known: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b"]:
        """log p(tokens), or log p(the other tokens | those `known`)."""
        onehot = torch.nn.functional.one_hot(tokens, self.vocab_size).bool()
        seen = torch.where(onehot, 0.0, -math.inf).double()
        if known is None:
            return self.log_partition(seen)
        given = torch.where(known[..., None], seen, 0.0)
        return self.log_partition(seen) - self.log_partition(given)


class EnumeratedJoint(ExactModel):
    """Any law of a few tokens, given by its table of probabilities (K, ..., K)."""

    def __init__(self, probabilities: Tensor) -> None:
        self.probabilities = probabilities.double() / probabilities.double().sum()
        self.length, self.vocab_size = probabilities.dim(), probabilities.shape[0]

    def log_marginals(self, evidence: Tensor) -> Tensor:
        total = self.probabilities.log()[None]
        for position in range(self.length):
            shape = [len(evidence)] + [1] * self.length
            shape[position + 1] = self.vocab_size
            total = total + evidence[:, position].reshape(shape)
        marginals = []
        for position in range(self.length):
            by_token = total.movedim(position + 1, 1).reshape(len(total), self.vocab_size, -1)
            marginals.append(by_token.logsumexp(2))
        return torch.stack(marginals, 1)

    def entropy(self) -> float:
        return torch.special.entr(self.probabilities).sum().item()

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        flat = torch.multinomial(self.probabilities.flatten(), n, replacement=True, generator=generator)
        return torch.stack(torch.unravel_index(flat, self.probabilities.shape), 1)

    def texts(self) -> Int[Tensor, "n l"]:
        """Every text, in the order of the flattened table."""
        cells = torch.arange(self.probabilities.numel())
        return torch.stack(torch.unravel_index(cells, self.probabilities.shape), 1)


class MarkovChain(ExactModel):
    """A stationary chain of `length` tokens, by forward-backward."""

    def __init__(self, initial: Tensor, transition: Tensor, length: int) -> None:
        self.initial, self.transition = initial.double(), transition.double()
        self.length, self.vocab_size = length, len(initial)

    def log_marginals(self, evidence: Tensor) -> Tensor:
        step = self.transition.log()
        forward = [self.initial.log() + evidence[:, 0]]
        backward = [torch.zeros_like(evidence[:, 0])]
        for position in range(1, self.length):
            forward.append((forward[-1][:, :, None] + step).logsumexp(1) + evidence[:, position])
            ahead = backward[-1] + evidence[:, self.length - position]
            backward.append((step + ahead[:, None, :]).logsumexp(2))
        return torch.stack(forward, 1) + torch.stack(backward[::-1], 1)

    def entropy(self) -> float:
        total, law = torch.special.entr(self.initial).sum(), self.initial
        for _ in range(self.length - 1):
            total = total + law @ torch.special.entr(self.transition).sum(1)
            law = law @ self.transition
        return total.item()

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        tokens = [torch.multinomial(self.initial, n, replacement=True, generator=generator)]
        for _ in range(self.length - 1):
            tokens.append(torch.multinomial(self.transition[tokens[-1]], 1, generator=generator)[:, 0])
        return torch.stack(tokens, 1)

    def enumerate(self) -> EnumeratedJoint:
        """The same law as a table."""
        table = self.initial
        for _ in range(self.length - 1):
            table = table[..., None] * self.transition
        return EnumeratedJoint(table)


class ExactMap(Oracle):
    """The two-time map of a diagonal: the mean of mu along the flow, eq. (5), in the clock u = t / (1 - t).

    There the flow is dy/du = mu(y, u) with y = x / (1 - t), so mu_{s,t} is the plain mean of mu over [u_s, u_t]. It
    is integrated by `steps` fourth-order Runge-Kutta steps up to u = 12, where every token is decided.
    """

    def __init__(self, diagonal: Oracle, steps: int = 64) -> None:
        self.diagonal, self.steps, self.vocab_size = diagonal, steps, diagonal.vocab_size

    def log_endpoint(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        clean, last = s >= 1, U_MAX / (1 + U_MAX)
        s, t = (torch.where(clean, 0.0, time) for time in (s, t))
        end = torch.maximum(t.clamp_max(last), s)
        start, length = s / (1 - s), end / (1 - end) - s / (1 - s)
        y = x / (1 - s)[..., None]

        def posterior(mean: Tensor, share: float) -> Tensor:
            u = start + share * length
            now = (y + length[..., None] * mean) / (1 + u)[..., None]
            time = torch.where(clean, 1.0, u / (1 + u))
            return self.diagonal.log_endpoint(now, time, time).softmax(-1)

        mean, h = torch.zeros_like(x), 1 / self.steps
        for i in range(self.steps):
            k1 = posterior(mean, i * h)
            k2 = posterior(mean + h / 2 * k1, (i + 0.5) * h)
            k3 = posterior(mean + h / 2 * k2, (i + 0.5) * h)
            k4 = posterior(mean + h * k3, (i + 1) * h)
            mean = mean + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        # Eq. (10): a jump s -> t beyond the end averages the mean so far with the decided posterior.
        beyond = t > end
        gap = torch.where(beyond, t - s, 1.0)
        share = torch.where(beyond, (1 - t) * (end - s) / ((1 - end) * gap), 1.0)[..., None]
        return (share * mean + (1 - share) * posterior(mean, 1.0)).clamp_min(1e-300).log()


class ConstantMap(Oracle):
    """A collapsed map: exact on the diagonal, one and the same distribution (K,) for every s < t."""

    def __init__(self, diagonal: Oracle, constant: Tensor) -> None:
        self.diagonal, self.constant, self.vocab_size = diagonal, constant.double(), diagonal.vocab_size

    def log_endpoint(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return torch.where((t > s)[..., None], self.constant.log(), self.diagonal.log_endpoint(x, s, s))


class Scaled(Oracle):
    """A wrong model: log probabilities times `factor`."""

    def __init__(self, inner: Oracle, factor: float) -> None:
        self.inner, self.factor, self.vocab_size = inner, factor, inner.vocab_size

    def log_endpoint(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return self.factor * self.inner.log_endpoint(x, s, t)


class Forgetful(Oracle):
    """Uniform at clean positions: a network is never trained to say what it is given."""

    def __init__(self, inner: Oracle) -> None:
        self.inner, self.vocab_size = inner, inner.vocab_size

    def log_endpoint(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return torch.where((s >= 1)[..., None], 0.0, self.inner.log_endpoint(x, s, t))


class Offset(Oracle):
    """A map with parameters: logits moved by theta (1 + t) direction; `theta` (L, V) or a scalar takes gradients."""

    def __init__(self, inner: Oracle, theta: Tensor, direction: Tensor) -> None:
        self.inner, self.theta, self.direction, self.vocab_size = inner, theta, direction, inner.vocab_size

    def log_endpoint(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return self.inner.log_endpoint(x, s, t) + (1 + t)[..., None] * (self.theta * self.direction)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_joint(vocab_size: int, length: int, *, seed: int = 0, spread: float = 1.0) -> EnumeratedJoint:
    """A joint whose log probabilities are `spread` times standard normal: correlated, nothing impossible."""
    logits = spread * torch.randn((vocab_size,) * length, generator=seeded(seed), dtype=torch.float64)
    return EnumeratedJoint(logits.exp())


def random_chain(vocab_size: int, length: int, *, seed: int = 0, spread: float = 1.5) -> MarkovChain:
    logits = spread * torch.randn((vocab_size + 1, vocab_size), generator=seeded(seed), dtype=torch.float64)
    return MarkovChain(logits[0].softmax(-1), logits[1:].softmax(-1), length)


def path_state(model: ExactModel, n: int, t: float | Tensor, seed: int = 0) -> State:
    """n states x_t of the path, in fp64; t is one time or (n, L)."""
    generator = seeded(seed)
    tokens = model.sample(n, generator)
    noise = torch.randn((n, model.length, model.vocab_size), generator=generator, dtype=torch.float64)
    times = t if isinstance(t, Tensor) else torch.full((n, 1), t, dtype=torch.float64)
    return interpolate(tokens, noise, times)


def time_like(state: AnyState, value: float) -> Float[Tensor, "b 1"]:
    """One time for every sequence of the state, in its dtype."""
    return state.x.new_full((state.batch_size, 1), value)


def times_like(state: AnyState, s: float, t: float) -> tuple[Float[Tensor, "b 1"], Float[Tensor, "b 1"]]:
    """Two such times."""
    return time_like(state, s), time_like(state, t)


def total_variation(tokens: Int[Tensor, "n l"], probabilities: Tensor) -> float:
    """Half the sum over texts of |frequency - probability|; probabilities (K, ..., K)."""
    cells = torch.zeros(len(tokens), dtype=torch.long)
    for position, size in enumerate(probabilities.shape):
        cells = cells * size + tokens[:, position]
    frequency = torch.bincount(cells, minlength=probabilities.numel()).double() / len(tokens)
    return 0.5 * (frequency - probabilities.flatten()).abs().sum().item()
