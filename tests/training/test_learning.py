"""A short training learns: the bound on a known Markov source moves from the unigram's entropy towards the chain's."""

from pathlib import Path

import numpy as np
import torch

from catmaps.config import Config, DataConfig, OptimiserConfig, TrainingConfig
from catmaps.model import load_run
from catmaps.network.denoiser import NetworkConfig
from catmaps.scoring import score
from catmaps.text.build import build_shards
from catmaps.text.corpus import Document
from catmaps.text.shards import sequences
from catmaps.text.tokenizers import Text8Tokenizer
from catmaps.training.train import start, train


def test_bound_falls_below_the_unigram_entropy(tmp_path: Path) -> None:
    # A cycle of four letters that is left with probability 1/4: unigram entropy ln 4, rate 0.84 nats.
    rng, step = np.random.default_rng(0), 0
    documents = []
    for i, split in enumerate(["train"] * 8 + ["test"]):
        jumps = np.where(rng.random(4000) < 0.25, rng.integers(0, 4, 4000), 1)
        letters = (step + jumps.cumsum()) % 4
        documents.append(Document(str(i), "cycle", str(i), "".join("abcd"[k] for k in letters), split))
    build_shards(documents, Text8Tokenizer(), tmp_path / "shards", progress=False)
    config = Config(
        data=DataConfig(shards=str(tmp_path / "shards"), length=16),
        network=NetworkConfig(width=32, blocks=1, heads=2, conditioning=16),
        optimiser=OptimiserConfig(warmup=10, ema=0.9),
        training=TrainingConfig(
            steps=150, batch=32, micro_batch=32, precision="fp32", compile=False, threads=1, evaluate_every=0
        ),
    )
    start(config, tmp_path / "run")
    train(tmp_path / "run")
    run = load_run(tmp_path / "run")
    result = score(run, torch.from_numpy(sequences(tmp_path / "shards", "test", 16)), num_samples=8)
    assert 0.8 < result.nats / result.tokens < 1.25  # unigram: 1.386
