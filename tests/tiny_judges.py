"""A random GPT-2 of a few thousand weights with a BPE of its own, as a directory that any judge is loaded from."""

from pathlib import Path

import pytest
import torch

TEXT = "the cat sat on a mat and saw two red fish in blue water while the dog slept by the fire "
POSITIONS = 32


def make_judge(folder: Path, positions: int = POSITIONS, seed: int = 0) -> Path:
    """Weights far from those of the usual start, so that predictions differ from token to token."""
    transformers = pytest.importorskip("transformers")
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=300,
        n_positions=positions,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
