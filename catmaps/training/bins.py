"""What the diagonal does over the clock, during training: loss, squared error, entropy, logits, gradient, by bin."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from olmo_core.distributed.utils import broadcast_object, get_rank
from olmo_core.train.callbacks import Callback
from torch import Tensor

from catmaps.flow.flow_map import FlowMap, positionwise
from catmaps.flow.interpolant import interpolate
from catmaps.flow.likelihood import squared_error
from catmaps.flow.times import warp
from catmaps.model import BINS
from catmaps.network.denoiser import FlowNetwork
from catmaps.tiles import Tile, over_tiles
from catmaps.training.module import FlowTrainModule
from catmaps.training.parallelize import let_go

CLOCK_BINS = 16
SEQUENCES = 8
NOISE = (0xB175, 0)  # a key of its own: training draws under (seed, step)


def bin_times(vocab_size: int, sequences: int) -> Float[Tensor, "16 {sequences}"]:
    """Times of every bin's sequences, evenly spread: bins are equal shares of the decoding-error warp.

    It is the same whatever law a run trains on, so that runs of one vocabulary compare bin by bin.
    """
    place = (torch.arange(sequences, dtype=torch.float64) + 0.5) / sequences
    tau = (torch.arange(CLOCK_BINS, dtype=torch.float64)[:, None] + place) / CLOCK_BINS
    return warp(vocab_size).quantile(tau).float()


def _looks(log_mu: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
    """Squared error, entropy in nats and largest logit, (B, L, 3)."""
    entropy = -(log_mu.exp() * log_mu).sum(-1)
    return torch.stack([squared_error(log_mu, tokens), entropy, logits.amax(-1).to(entropy.dtype)], -1)


def bin_figures(
    network: FlowNetwork, tokens: Int[Tensor, "n l"], t: Float[Tensor, "n"], first: int, gradient: bool = True
) -> dict[str, float | None]:
    """Figures of a bin: means over positions of the cross-entropy (nats), squared error and entropy, the largest logit,
    and the norm of the mean cross-entropy's gradient. No parameter's `.grad` is touched.

    Args:
        network: In training.
        tokens: Texts.
        t: Their times.
        first: Index of their noise.
        gradient: Whether its norm is wanted; else None.
    """
    flow_map, time = FlowMap(network), t[:, None]
    noise = flow_map.noise(NOISE, torch.arange(first, first + len(tokens), device=tokens.device), tokens.shape[1])
    with torch.set_grad_enabled(gradient):
        endpoint = flow_map.read(interpolate(tokens, noise, time), time, time)
        nats = positionwise(endpoint, lambda log_mu, tile: -log_mu.gather(-1, tile(tokens)[..., None])[..., 0])
        loss = nats.mean()
    norm = None
    if gradient:
        weights = [p for p in network.parameters() if p.requires_grad]
        parts = torch.autograd.grad(loss, weights, allow_unused=True)
        norm = torch.stack([part.double().square().sum() for part in parts if part is not None]).sum().sqrt().item()

    def work(tile: Tile) -> Tensor:
        own = tile(endpoint)
        return _looks(own.log, own.readout.logits(), tile(tokens))

    with torch.no_grad():
        seen = over_tiles(work, endpoint.shape, network.tile)
    square, entropy, _ = seen.double().mean((0, 1)).tolist()
    return {
        "loss": loss.item(),
        "squared_error": square,
        "entropy": entropy,
        "largest_logit": seen[..., 2].max().item(),
        "gradient_norm": norm,
    }


def clock_figures(
    network: FlowNetwork, tokens: Int[Tensor, "n l"], gradient: bool = True
) -> dict[str, list[float | None]]:
    """`bin_figures` of every bin, at the same texts and noise whenever it is called, and `t`, the bins' mean times.

    Compiled parts run uncompiled meanwhile: other shapes would have them compiled anew, and training's sums rounded
    otherwise from then on.
    """
    times = bin_times(network.vocab_size, len(tokens)).to(tokens.device)
    with torch.compiler.set_stance("force_eager"):
        rows = [bin_figures(network, tokens, t, i * len(tokens), gradient) for i, t in enumerate(times)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {"t": times.mean(1).tolist(), **columns}


@dataclass
class BinsCallback(Callback):
    """Appends to bins.jsonl, whenever validation is due, the figures of 16 bins of the clock, for flows.

    Of the network in training, on a few fixed texts. Training's numbers are the same with and without.
    """

    folder: Path = field(default_factory=Path)
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    every: int = 0
    _known: set[int] = field(default_factory=set)

    def pre_train(self) -> None:
        """A resumed run repeats the steps after its last checkpoint: their lines go, and a half one."""
        if get_rank() == 0:
            self._forget_what_was_undone()
        self._known = broadcast_object(self._known)

    def _forget_what_was_undone(self) -> None:
        file = self.folder / BINS
        if not file.exists():
            return
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        self._known = {json.loads(line)["step"] for line in kept}
        file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def post_train_batch(self) -> None:
        if self.every and self.step % self.every == 0:
            self.write()

    def post_train(self) -> None:
        if self.every:
            self.write()

    def write(self) -> None:
        """Processes that share a network all call it; the gradient is left out, whose parts lie with different ones."""
        module = self.trainer.train_module
        assert isinstance(module, FlowTrainModule)
        network = module.network
        if not isinstance(network, FlowNetwork) or len(self.tokens) == 0 or (get_rank() != 0 and not module.sharded):
            return
        if self.step in self._known:
            return
        self._known.add(self.step)
        tokens = self.tokens.to(network.log_prior.device)
        figures = clock_figures(network, tokens, gradient=not module.sharded)
        let_go(network)
        if get_rank() == 0:
            with (self.folder / BINS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **figures}) + "\n")
