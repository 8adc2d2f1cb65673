"""`catmaps score`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from catmaps.cli import parse


@dataclass(frozen=True)
class Score:
    """An upper bound on the negative log-likelihood of text under the base flow (a map's diagonal).

    Text longer than the training length is cut into windows that are scored on their own.

    Examples: catmaps score runs/base novel.txt; catmaps score runs/base --split test --windows 1024
    """

    run_: tyro.conf.Positional[Path]
    """Folder of a run."""
    file: tyro.conf.Positional[Path | None] = None
    """A UTF-8 text file."""
    split: Literal["train", "valid", "test"] | None = None
    """Instead of a file: random windows of a split of the run's corpus."""
    windows: int = 512
    """With --split: how many."""
    samples: int = 16
    """Random times per window, at least 2."""
    seed: int = 0
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from catmaps.errors import UserError
        from catmaps.model import load_run
        from catmaps.scoring import cut, score

        if (self.file is None) == (self.split is None):
            raise UserError("score one thing: a FILE, or --split train|valid|test")
        run = load_run(self.run_)
        if self.file is not None:
            windows, tail = cut(run, read_text(self.file))
        else:
            windows, tail = split_windows(self, run), None
        result = score(run, windows, tail, num_samples=self.samples, seed=self.seed).as_dict()
        print(
            f"NELBO {result['nelbo_bits_per_char']:.4f} bits/char (upper bound), "
            f"s.e. {result['stderr_bits_per_char_monte_carlo']:.4f} from sampling, "
            f"{result['stderr_bits_per_char_windows']:.4f} over windows"
        )
        print(
            f"{result['nelbo_nats']:.1f} nats, {result['characters']} characters, {result['tokens']} tokens in "
            f"{result['windows']} windows, {self.samples} samples each; perplexity bound "
            f"{result['nelbo_perplexity_per_token']:.2f} per token"
        )
        return {"run": str(self.run_), "text": str(self.file or self.split), "seed": self.seed, **result}


def read_text(file: Path) -> str:
    """A user's text; UserError if it is missing or not UTF-8."""
    from catmaps.errors import UserError

    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from error


def split_windows(command: Score, run: Any) -> Any:
    import torch

    from catmaps.errors import UserError
    from catmaps.text.shards import sequences
    from catmaps.training.train import find_shards

    assert command.split is not None
    if command.windows < 1:
        raise UserError("--windows must be at least 1")
    shards, length = find_shards(run.config), run.config.data.length
    count = min(command.windows, len(sequences(shards, command.split, length)))
    return torch.from_numpy(sequences(shards, command.split, length, count=count, seed=command.seed))


def read(name: str, args: list[str]) -> Score:
    return parse(Score, args, f"catmaps {name}")
