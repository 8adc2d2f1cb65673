"""Run folders of networks that were never trained: random to the last weight, so that all of them matter."""

from pathlib import Path
from typing import Any

import torch

from catmaps.config import Config, DataConfig, TrainingConfig, to_json
from catmaps.flow import times
from catmaps.flow.objective import ObjectiveConfig
from catmaps.model import CLOCK, CONFIG, MODEL, network_of, write_law, write_tensors
from catmaps.network.denoiser import NetworkConfig, uniform_log_prior
from catmaps.text import tokenizers
from catmaps.text.tokenizers import Text8Tokenizer, Tokenizer


def config_of(*, a_map: bool = True, length: int = 12, **changes: Any) -> Config:
    """A flow map of one block in fp32."""
    return Config(
        **{
            "data": DataConfig(length=length),
            "network": NetworkConfig(width=16, blocks=1, heads=2, conditioning=8, mlp_ratio=2),
            "objective": ObjectiveConfig(off_diagonal=0.5 if a_map else 0.0),
            "training": TrainingConfig(precision="fp32"),
            **changes,
        }
    )


def make_run(folder: Path, config: Config, tokenizer: Tokenizer | None = None) -> Path:
    """Writes it."""
    tokenizer, generator = tokenizer or Text8Tokenizer(), torch.Generator().manual_seed(0)
    network = network_of(config, uniform_log_prior(tokenizer.vocab_size))
    for parameter in network.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    tokenizers.save(tokenizer, folder)
    (folder / CONFIG).write_text(to_json(config))
    write_tensors(network.state_dict(), folder / MODEL)
    write_law(times.uniform(), folder / CLOCK)
    return folder
