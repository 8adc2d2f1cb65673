"""The same trunk on discrete text, for the baselines: ids and a time in, logits out."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from catmaps.network.denoiser import Features, FlowNetwork, NetworkConfig
from catmaps.network.embedding import Conditioner
from catmaps.network.published import PublishedNetwork
from catmaps.network.trunk import Trunk


class TokenNetwork(nn.Module):
    """(ids, t) -> logits of a distribution over the vocabulary at every position.

    Trunk, conditioning, head and logit bias are `FlowNetwork`'s; in place of its belief a table gives each id its
    vector, and there are neither gains nor tangents. Both times of the conditioning are t.

    Args:
        config: Shape; its `input` and `skip` are idle.
        features: Embeds a time; a module.
        log_prior: log of the smoothed unigram of the training text, (V,); the logits' bias.
        special: Ids V, V + 1, ... that texts do not have: a mask, a start symbol.
        causal: Whether a position sees itself and those before it only.
    """

    log_prior: Tensor
    features: Features

    def __init__(
        self,
        config: NetworkConfig,
        features: Features,
        log_prior: Float[Tensor, "v"],
        *,
        special: int = 0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.precision = config, torch.float32
        vocab_size, width = len(log_prior), config.width
        self.register_buffer("log_prior", log_prior.float())
        self.features = features
        self.table = nn.Embedding(vocab_size + special, width)
        self.conditioner = Conditioner(features.size, config.conditioning)
        shape = (config.blocks, config.heads, config.conditioning, config.mlp_ratio, config.neighbours)
        self.trunk = Trunk(width, *shape, causal)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What the parts do not know: logits start at the log prior."""
        nn.init.zeros_(self.head.weight)

    @property
    def vocab_size(self) -> int:
        return self.head.out_features

    def forward(self, tokens: Int[Tensor, "b l"], t: Float[Tensor, "b 1"]) -> Float[Tensor, "b l v"]:
        """Logits, fp32 (fp64 for a network in fp64)."""
        phi, lean = self.features(t), self.precision == torch.bfloat16
        with torch.autocast(self.log_prior.device.type, dtype=torch.bfloat16, enabled=lean):
            condition = self.conditioner(phi, phi)
            x = self.table(tokens)
            # As wide as what the flow's embedding gives: the residual stream is then that of the flow.
            context = self.head(self.trunk(x.bfloat16() if lean else x, condition, None))
        return context.to(self.log_prior.dtype) + self.log_prior

    def num_parameters(self) -> tuple[int, int]:
        """(body, vocabulary): parameters outside and inside the two vocabulary tables."""
        vocabulary = self.table.weight.numel() + self.head.weight.numel()
        return sum(p.numel() for p in self.parameters()) - vocabulary, vocabulary


Flow = FlowNetwork | PublishedNetwork
Network = Flow | TokenNetwork
