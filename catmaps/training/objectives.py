"""What a batch's loss is, for the flow and for baselines: a function of (seed, step) and global sample indices."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from catmaps.baselines.draws import counter_draws
from catmaps.baselines.families import FAMILIES
from catmaps.config import Config
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.likelihood import Bound, nelbo
from catmaps.flow.objective import BatchLoss, Plan, Weigh, batch_loss, plan
from catmaps.flow.times import Law, stratified
from catmaps.model import starting_law
from catmaps.network.denoiser import FlowNetwork
from catmaps.network.tokens import Network, TokenNetwork
from catmaps.scoring import integrand_of

Key = tuple[int, int]


@runtime_checkable
class Batch(Protocol):
    """One step's draws for the whole batch, and the loss of any of its rows."""

    @property
    def counts(self) -> Float[Tensor, "3"]:
        """Positions with a loss by role, over the batch; 0 where the family has no roles."""
        ...

    def loss(
        self, tokens: Int[Tensor, "b l"], index: Int[Tensor, "b"], together: Int[Tensor, "n"] | None = None
    ) -> BatchLoss:
        """The share of these rows in the batch's loss; `index` is their place in the batch.

        `together` are the rows of all processes that share a network, which must make the same calls of it.
        """
        ...


@runtime_checkable
class Objective(Protocol):
    def batch(self, law: Law, rows: int, length: int, key: Key, weigh: Weigh | None = None) -> Batch:
        """Plans a batch of `rows` texts over all processes; `key` is (seed, step), `weigh` weighs diagonal times."""
        ...

    def bound(self, network: Network, law: Law, generator: torch.Generator) -> Callable[[Int[Tensor, "b l"]], Bound]:
        """The bound of 8 draws, for validation: a function of texts, of one network as it is now."""
        ...


class FlowBatch:
    def __init__(self, objective: "FlowObjective", whole: Plan, key: Key) -> None:
        self.objective, self.whole, self.key = objective, whole, key
        self.noisy = (~whole.known).sum(1).double()

    @property
    def counts(self) -> Float[Tensor, "3"]:
        return torch.stack([self.noisy[self.whole.role == role].sum() for role in range(3)])

    def loss(
        self, tokens: Int[Tensor, "b l"], index: Int[Tensor, "b"], together: Int[Tensor, "n"] | None = None
    ) -> BatchLoss:
        flow_map, device, own = self.objective.flow_map, tokens.device, len(tokens)
        if together is not None:  # a role that only others have is called here too, on clean rows, which count nothing
            more = self.whole.lacking(index, together)
            tokens, index = torch.cat([tokens, tokens[:1].expand(len(more), -1)]), torch.cat([index, more])
        noise = flow_map.noise(self.key, index.to(device), tokens.shape[1])
        rows, config = self.whole.rows(index, device), self.objective.config.objective
        rows.known[own:] = True
        normaliser, average = self.noisy.sum().item(), self.objective.average
        return batch_loss(flow_map, self.objective.teacher, config, tokens, noise, rows, normaliser, average)


class FlowObjective:
    """The mixture of `config.objective`, with the frozen base of a distillation as teacher."""

    def __init__(
        self, config: Config, network: FlowNetwork, teacher: FlowNetwork | None, average: FlowNetwork | None = None
    ) -> None:
        self.config, self.flow_map = config, FlowMap(network)
        self.teacher = None if teacher is None else FlowMap(teacher.requires_grad_(False))
        self.average = FlowMap(average) if average is not None and config.average_teaches else None
        self.sampling = starting_law(config.clock, network.vocab_size)

    def batch(self, law: Law, rows: int, length: int, key: Key, weigh: Weigh | None = None) -> FlowBatch:
        generator = torch.Generator().manual_seed(key[0] * 1_000_003 + key[1])
        weigh = weigh if self.teacher is None else None
        return FlowBatch(self, plan(self.config.objective, law, rows, length, generator, self.sampling, weigh), key)

    def bound(self, network: Network, law: Law, generator: torch.Generator) -> Callable[[Int[Tensor, "b l"]], Bound]:
        assert isinstance(network, FlowNetwork)
        flow_map, integrand = FlowMap(network), integrand_of(network)
        return lambda tokens: nelbo(flow_map, tokens, law, num_samples=8, generator=generator, integrand=integrand)


class BaselineBatch:
    def __init__(self, objective: "BaselineObjective", place: Float[Tensor, "b"], key: Key) -> None:
        self.objective, self.place, self.key = objective, place, key
        self.counts = torch.zeros(3)

    def loss(
        self, tokens: Int[Tensor, "b l"], index: Int[Tensor, "b"], together: Int[Tensor, "n"] | None = None
    ) -> BatchLoss:
        del together  # a family has one kind of call
        network, device = self.objective.network, tokens.device
        draws = counter_draws(self.key, index.numpy(), self.place[index], tokens.shape[1])
        weight = torch.full(tokens.shape, 1 / (len(self.place) * tokens.shape[1]), device=device)
        total = self.objective.family.loss(network, tokens, draws.to(device), weight).total
        none = torch.zeros(0, device=device)
        return BatchLoss(total, none, none, none, torch.zeros(3, device=device), torch.zeros(3))


class BaselineObjective:
    """A family's loss at every position of every text."""

    def __init__(self, config: Config, network: TokenNetwork) -> None:
        self.family, self.network = FAMILIES[config.family], network

    def batch(self, law: Law, rows: int, length: int, key: Key, weigh: Weigh | None = None) -> BaselineBatch:
        del law, length, weigh
        generator = torch.Generator().manual_seed(key[0] * 1_000_003 + key[1])
        return BaselineBatch(self, stratified(rows, generator, torch.float64), key)

    def bound(self, network: Network, law: Law, generator: torch.Generator) -> Callable[[Int[Tensor, "b l"]], Bound]:
        del law
        return lambda tokens: self.family.bound(network, tokens, num_samples=8, generator=generator)


def objective_of(
    config: Config, network: Network, teacher: Network | None, average: Network | None = None
) -> Objective:
    if isinstance(network, TokenNetwork):
        return BaselineObjective(config, network)
    assert isinstance(network, FlowNetwork)
    assert teacher is None or isinstance(teacher, FlowNetwork)
    assert average is None or isinstance(average, FlowNetwork)
    return FlowObjective(config, network, teacher, average)
