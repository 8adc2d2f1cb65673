"""What a batch does: plan it, draw its noise, backward over micro-batches, step, follow with the moving average."""

# torch's optimisers are made of its _foreach functions, which it does not export.
# pyright: reportPrivateImportUsage=false

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.train import ReduceType
from olmo_core.train.train_module import EvalBatchSpec, TrainModule
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule

from catmaps.config import Config
from catmaps.flow.adaptive import BINS, InformationClock
from catmaps.flow.times import Law
from catmaps.flow.weighting import LossMoments, weights
from catmaps.model import must_match, starting_law
from catmaps.network.tokens import Network
from catmaps.training.guard import Guard
from catmaps.training.objectives import objective_of
from catmaps.training.optim import build_optimisers, rate, set_rate
from catmaps.training.parallelize import forget_casts, is_sharded, let_go, local, whole

ROLES = ("diagonal", "off_diagonal", "anchor")


class FlowTrainModule(TrainModule):
    """Trains a network of any family on its objective.

    Args:
        config: The run's.
        network: In training; on every process the same.
        average: Another network of the same weights, which becomes their moving average.
        teacher: The frozen base of a distillation, or None.
        law: Law of time at the start, of a run that began with another's weights that one's; with
            `config.clock.adaptive` and no teacher it follows the information. Baselines have none: it stays as it is.
    """

    def __init__(self, config: Config, network: Network, average: Network, teacher: Network | None, law: Law) -> None:
        super().__init__()
        self.config, self.network, self.average = config, network, average.requires_grad_(False)
        self.objective = objective_of(config, network, teacher, self.average)
        self.optimisers = build_optimisers(network, config.optimiser)
        clock = law if config.start is None else starting_law(config.clock, network.vocab_size)
        self.clock = InformationClock(clock, None if config.start is None else law)
        self.moments = LossMoments(clock)
        self.adapts = config.clock.adaptive and teacher is None
        self.sharded = is_sharded(network)
        self.guard = Guard(config.optimiser.spike, config.optimiser.patience)
        self.source = Path("the checkpoint")  # what it is loaded from, for messages
        self.busy = 0.0
        """Seconds of this process's passes in the last step."""
        self._added: list[Tensor] | None = None

    @property
    def law(self) -> Law:
        """The law of time in force."""
        return self.clock.law if self.adapts else self.clock.clock

    def weigh(self, t: Tensor) -> Tensor:
        """Weights of diagonal times."""
        return weights(self.config.objective.weighting, t, self.law, self.moments)

    @property
    def eval_batch_spec(self) -> EvalBatchSpec:
        return EvalBatchSpec(rank_batch_size=self.config.training.micro_batch * self.config.data.length)

    def train_batch(self, batch: dict[str, Any], dry_run: bool = False) -> None:
        """Forward and backward of this process's share; a dry run compiles and changes nothing."""
        training, rank, world, began = self.config.training, get_rank(), get_world_size(), time.monotonic()
        device = self.network.log_prior.device
        tokens = batch["input_ids"].long().to(device)
        step = 0 if dry_run else self.trainer.global_step
        drawn = self.objective.batch(self.law, len(tokens) * world, tokens.shape[1], (training.seed, step), self.weigh)
        index = torch.arange(len(tokens)) * world + rank
        loss, sums = torch.zeros((), device=device), torch.zeros(3, device=device)
        added = torch.zeros(2, BINS, dtype=torch.float64)
        losses = torch.zeros(3, BINS, dtype=torch.float64)
        for rows in torch.arange(len(tokens)).split(training.micro_batch):
            together = torch.arange(int(rows[0]) * world, (int(rows[-1]) + 1) * world) if self.sharded else None
            part = drawn.loss(tokens[rows], index[rows], together)
            if isinstance(self.network, FSDPModule):  # replicas of what is shared add up once a step
                self.network.set_requires_all_reduce(int(rows[-1]) == len(tokens) - 1)
            part.total.backward()
            loss, sums = loss + part.total.detach(), sums + part.sums
            added = added + self.clock.contributions(part.diagonal_times, part.squared_error)
            losses = losses + self.moments.contributions(part.diagonal_times, part.cross_entropy)
        if dry_run:
            self.zero_grads()
            return
        self.busy = time.monotonic() - began
        self._added = _sum_over_processes([added, losses])
        self.record_metric("loss", loss, ReduceType.sum)
        for name, value, count in zip(ROLES, sums, drawn.counts.tolist(), strict=True):
            if count:
                self.record_metric(f"loss_{name}", value / count, ReduceType.sum)

    def optim_step(self) -> None:
        """Sums gradients over processes and clips them; steps and moves average and clock, unless the step is odd."""
        optimiser, step = self.config.optimiser, self.trainer.global_step
        if not self.sharded:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            if get_world_size() > 1:
                torch._foreach_copy_(gradients, _sum_over_processes(gradients))
        norm = whole(nn.utils.clip_grad_norm_(self.network.parameters(), optimiser.clip))
        factor = rate(step, self.config.training.steps, optimiser)
        self.record_metric("gradient_norm", norm, ReduceType.max)
        self.record_metric("rate", torch.tensor(factor), ReduceType.max)
        if self.guard.refuses(norm.item(), step):
            self.record_metric("skipped", torch.ones(()), ReduceType.max)
        else:
            self._take(factor, step)

    def _take(self, factor: float, step: int) -> None:
        set_rate(self.optimisers, factor)
        for o in self.optimisers:
            o.step()
        if self.sharded:
            let_go(self.average)  # its shares, and not what it gathered where it taught, follow the network
        decay = min(self.config.optimiser.ema, step / (step + 9))
        with torch.no_grad():
            means, owns = ([local(p) for p in net.parameters()] for net in (self.average, self.network))
            torch._foreach_lerp_(means, owns, 1 - decay)  # one kernel for all: launching them takes an accelerator long
        for net in (self.network, self.average):  # fused optimisers and gathers leave a tensor's version as it was
            forget_casts(net)
        if self._added is not None:
            self.clock.update(self._added[0], step)
            self.moments.update(self._added[1])

    def zero_grads(self) -> None:
        for o in self.optimisers:
            o.zero_grad(set_to_none=True)

    def state_dict(self, *, optim: bool | None = None) -> dict[str, Any]:
        options = dcp.StateDictOptions(cpu_offload=True)
        state: dict[str, Any] = {
            "model": dcp.get_model_state_dict(self.network, options=options),
            "average": dcp.get_model_state_dict(self.average, options=options),
            "clock": self.clock.state_dict(),
            "guard": self.guard.state_dict(),
            "moments": self.moments.state_dict(),
        }
        if optim is not False:
            state["optim"] = dcp.get_optimizer_state_dict(self.network, self.optimisers, options=options)
        return state

    def state_dict_to_load(self, metadata: Metadata, *, optim: bool | None = None) -> dict[str, Any]:
        """What a checkpoint has to hold.

        Raises:
            UserError: It lacks a tensor, has an unknown one or one of another shape; names it.
        """
        state = self.state_dict(optim=optim)
        for part in ("guard", "moments"):
            if not any(name.startswith(f"{part}.") for name in metadata.state_dict_metadata):
                del state[part]  # of an earlier version
        stored = {
            name: tuple(about.size)
            for name, about in metadata.state_dict_metadata.items()
            if isinstance(about, TensorStorageMetadata) and (optim is not False or not name.startswith("optim."))
        }
        must_match(_shapes(state), stored, self.source)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        dcp.set_model_state_dict(self.network, state_dict["model"])
        dcp.set_model_state_dict(self.average, state_dict["average"])
        self.clock.load_state_dict(state_dict["clock"])
        if "guard" in state_dict:
            self.guard.load_state_dict(state_dict["guard"])
        if "moments" in state_dict:
            self.moments.load_state_dict(state_dict["moments"])
        if "optim" in state_dict:
            dcp.set_optimizer_state_dict(self.network, self.optimisers, state_dict["optim"])

    def eval_batch(self, batch: dict[str, Any], labels: Any = None) -> Any:
        """The base loss of a batch; validation proper is the bound of `callbacks.ValidationCallback`."""
        raise RuntimeError("catmaps validates through its own callback, not through the engine's evaluators")

    def num_flops_per_token(self, seq_len: int) -> int | None:
        return None

    def global_num_flops_in_batch(self, batch: dict[str, Any]) -> int | None:
        return None


def _shapes(tree: dict[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of nested dictionaries, under the names that a checkpoint gives them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            shapes |= _shapes(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            shapes[prefix + name] = tuple(value.shape)
    return shapes


def _sum_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    """Sums over processes in one reduction. Losses are divided by global counts, so sums are means."""
    if get_world_size() == 1:
        return tensors
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
