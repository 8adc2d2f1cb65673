"""catmaps' models as transformers' models. This module and `generating` need the extra `hf`; nothing else here does.

With this module imported, `AutoModel.from_pretrained(DIR)` knows the model type; without it, `trust_remote_code=True`
imports it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from catmaps.config import HUB_TYPE, Config, config_from
from catmaps.errors import UserError
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import State
from catmaps.hub.export import AUTO_MAP, shape, write_modules
from catmaps.hub.generating import CatmapsGenerationConfig, GenerationMixin
from catmaps.model import Run, configure, network_of, starting_law
from catmaps.network.denoiser import uniform_log_prior
from catmaps.text.alphabets import Tokenizer


class _Ids(Tokenizer):
    """A vocabulary of V ids: text is the business of transformers' tokenizers."""

    name, eos_id = "ids", None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def normalise(self, text: str) -> str:
        raise UserError("this model takes ids: encode text with the tokenizer of its directory")

    def encode(self, text: str) -> UInt[np.ndarray, "_"]:
        return np.array([self.normalise(text)])

    def decode(self, ids: Integer[np.ndarray, "_"] | Sequence[int]) -> str:
        raise UserError("this model gives ids: decode them with the tokenizer of its directory")

    def token_strings(self) -> list[str]:
        return [f"<{i}>" for i in range(self.vocab_size)]


class CatmapsConfig(PretrainedConfig):
    """The configuration of a run, as transformers keeps one.

    Args:
        run: `catmaps.config.Config` as a dictionary; None: its defaults.
        vocab_size: V.
        kwargs: What transformers adds.

    Raises:
        UserError: `run` is not a configuration of this version.
    """

    model_type = HUB_TYPE

    def __init__(self, run: dict[str, Any] | None = None, vocab_size: int = 27, **kwargs: Any) -> None:
        self.run = asdict(Config()) if run is None else run
        self.vocab_size = vocab_size
        derived: dict[str, Any] = {**shape(self.catmaps), "auto_map": dict(AUTO_MAP)}
        super().__init__(**(derived | kwargs))

    @property
    def catmaps(self) -> Config:
        """The run's configuration."""
        return config_from(self.run, "the model's config.json")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: the modules that a saved directory needs are `write_modules`'."""


@dataclass
class CatmapsOutput(ModelOutput):
    """What a call of the network gives."""

    logits: Tensor | None = None
    """(B, L, V) of the endpoint mu_{s,t}, fp32."""


class CatmapsModel(GenerationMixin, PreTrainedModel):
    """A flow, a flow map or a baseline. `network` is catmaps' own module, `run` all of its functions' argument.

    Saved and loaded weights are equal to the bit in fp32. `dtype=torch.bfloat16` keeps the blocks' weights in bf16;
    what belongs to times and evidence stays in fp32.
    """

    config_class = CatmapsConfig
    generation_config_class = CatmapsGenerationConfig
    main_input_name = "x"
    base_model_prefix = "catmaps"
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = {
        *("features", "gain_in", "gain_out", "log_prior", "embedding"),
        *("start", "arrival", "norm", "norm1", "norm2"),  # of imported networks
    }

    def __init__(self, config: CatmapsConfig) -> None:
        super().__init__(config)
        settings = config.catmaps
        self.network = network_of(settings, uniform_log_prior(config.vocab_size))
        configure(self.network, settings.training)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing to do: catmaps' modules start themselves, and `from_pretrained` refuses what is incomplete."""

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: the modules that a saved directory needs are `write_modules`'."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers, but strict: weights that are missing, unknown or of another shape are errors.

        Raises:
            ValueError: They are named.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[what]:
                raise ValueError(f"{args[0]}: {what.replace('_', ' ')} {sorted(map(str, info[what]))[:3]}")
        if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
            model.network.precision = torch.bfloat16
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As everywhere in transformers; the modules of `trust_remote_code` are written as well."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_modules(Path(save_directory))
        self.config.auto_map = dict(AUTO_MAP)  # of a model from the Hub it would point back there
        super().save_pretrained(save_directory, **kwargs)

    @property
    def run(self) -> Run:
        """The model as catmaps' functions take it: `generation`, `infill`, `scoring`. It encodes no text."""
        settings, size = self.config.catmaps, self.config.vocab_size
        name = Path(self.config._name_or_path or "model")
        return Run(name, settings, self.network, _Ids(size), starting_law(settings.clock, size))

    @property
    def flow_map(self) -> FlowMap:
        """Endpoints, jumps, velocities. UserError for a baseline."""
        return self.run.flow_map

    def forward(
        self, x: Float[Tensor, "b l v"], s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"] | None = None
    ) -> CatmapsOutput:
        """Logits of the endpoint mu_{s,t}(x) of a flow.

        Args:
            x: Noisy text at time s, (B, L, V): (1 - s) noise + s one-hot.
            s: Time of every position, (B, L) or (B, 1); 0 is noise, 1 is clean text.
            t: Where a map jumps to, s <= t <= 1. None: s, the diagonal.
        """
        return CatmapsOutput(logits=self.flow_map.logits(State(x), s, s if t is None else t))


def from_run(run: Run) -> CatmapsModel:
    """The transformers model of a run, which shares no weights with it."""
    settings = asdict(run.config)
    model = CatmapsModel(CatmapsConfig(run=settings, vocab_size=run.tokenizer.vocab_size))
    model.network.load_state_dict(run.network.state_dict())
    return model.eval()


AutoConfig.register(HUB_TYPE, CatmapsConfig)
AutoModel.register(CatmapsConfig, CatmapsModel)
