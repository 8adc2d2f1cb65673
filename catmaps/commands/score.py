"""`catmaps score`."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from catmaps.cli import parse
from catmaps.models import BASE

if TYPE_CHECKING:
    from catmaps.model import Run
    from catmaps.scores import TextScore
    from catmaps.scoring import ScoringConfig, Text


@dataclass(frozen=True)
class Score:
    """An upper bound on the negative log-likelihood of texts under the base flow (a map's diagonal).

    Text longer than the training length L is cut into windows of L tokens, which are scored on their own; a shorter
    rest is a window too. With --context K every window but the first also sees K or more tokens before it as clean
    text, and scores L - K. Either way the sum bounds the text as it is written window by window, given its length.

    All bounds score the diagonal: the base, sampled ancestrally. The few-step push-forward of a map has no tight bound.
    """

    run_: tyro.conf.Positional[Path] = BASE
    """Folder of a run; `words-base` comes with the package, and is taken where a file comes first."""
    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """UTF-8 text files, each one text; - is standard input."""
    split: Literal["train", "valid", "test"] | None = None
    """Instead of files: random windows of a split of the run's corpus, each one text."""
    windows: int = 512
    """With --split: how many."""
    lines: bool = False
    """Every line of the files is a text of its own; empty ones are left out."""
    bound: Literal["nelbo", "cross-entropy", "finite-step"] = "nelbo"
    """The tightest; its cross-entropy form, about twice as large; or that of texts drawn in --steps N calls."""
    steps: int | None = None
    """With --bound finite-step: N."""
    grid: Literal["clock", "best"] = "clock"
    """With --bound finite-step: times equally spaced on the run's clock, or the best for its validation text."""
    samples: int | None = None
    """Draws per window, at least 2; default 16, or of every finite step 16/N, at least 2."""
    context: int = 0
    """Clean tokens before each window, K."""
    t_max: float = 0.9
    """Where the path's integral is cut; valid anywhere in (0, 1). A `linear` run without skip may need 0.99."""
    pilot: bool = False
    """Measure a law of time for these texts first (48 calls of up to 32 windows), instead of the run's."""
    out: Path | None = None
    """A JSON object per text goes there, one a line."""
    per_token: bool = False
    """With --out: also the tokens and what each adds to the bound, in nats."""
    seed: int = 0
    compile: bool = False
    """Compile the network first: about half a minute, then 2.5 times as fast on CPUs."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from catmaps.errors import UserError
        from catmaps.model import load_run
        from catmaps.scores import pool
        from catmaps.scoring import ScoringConfig, score_texts

        if bool(self.files) == (self.split is not None):
            raise UserError("score one thing: a FILE, or --split train|valid|test")
        if self.per_token and self.out is None:
            raise UserError("--per-token goes into --out FILE.jsonl: name one")
        if self.grid == "best" and self.bound != "finite-step":
            raise UserError("--grid belongs to --bound finite-step")
        config = ScoringConfig(
            bound=self.bound,
            samples=self.samples,
            steps=self.steps,
            t_max=self.t_max,
            pilot=self.pilot,
            seed=self.seed,
            compile=self.compile,
        )
        if self.out is not None and (self.out.is_dir() or not self.out.absolute().parent.is_dir()):
            problem = "it is a folder" if self.out.is_dir() else f"no folder {self.out.parent}"
            raise UserError(f"cannot write {self.out}: {problem}")
        run = load_run(self.run_)
        texts = split_texts(self, run) if self.split is not None else file_texts(self, run)
        config = with_best_grid(config, run) if self.grid == "best" else config
        scores = score_texts(run, texts, config)
        total = pool(scores, config.num_samples, config.bound, config.steps)
        kind = "exact" if run.config.family == "autoregressive" else "upper bound"
        if self.out is not None:
            write_lines(self, run, config, scores)
        elif self.split is None and len(scores) > 1:
            for score in scores:
                line = score.as_dict()
                rate, spread = line["bound_bits_per_char"], line["bound_stderr_bits_per_char"]
                print(f"{rate:.4f} ± {spread:.4f} bits/char ({kind})  {score.name}")
        said = total.as_dict()
        describe(config.label, said, sum(score.normalised for score in scores), kind)
        text = ", ".join(str(file) for file in self.files) or self.split
        times = {"times": config.times} if config.times else {}
        return {"run": str(self.run_), "text": text, "seed": self.seed, **times, **said}


def describe(label: str, said: dict[str, Any], normalised: int, kind: str) -> None:
    """The pooled bound for people; `kind` says what it is."""
    rate, perplexity, nats = (
        next(value for key, value in said.items() if key.endswith(ending) and not key.startswith("stderr"))
        for ending in ("_bits_per_char", "_perplexity_per_token", "_nats")
    )
    over_windows = f", {said['stderr_bits_per_char_windows']:.4f} over windows" if said["windows"] > 1 else ""
    over_texts = f", {said['stderr_bits_per_char_texts']:.4f} over texts" if 1 < said["texts"] < said["windows"] else ""
    print(
        f"{label} {rate:.4f} bits/char ({kind}), s.e. {said['stderr_bits_per_char_monte_carlo']:.4f} from "
        f"sampling{over_windows}{over_texts}"
    )
    print(
        f"{nats:.1f} nats, {said['characters']} characters, {said['bytes']} bytes, {said['tokens']} tokens in "
        f"{said['windows']} windows, {said['samples_per_window']} samples each; perplexity bound "
        f"{perplexity:.2f} per token"
    )
    if normalised:
        print(f"the tokenizer normalised {normalised} of {said['texts']} texts; bound and counts are of the result")


def read_text(file: Path) -> str:
    """A user's text, or standard input for -; UserError if it is missing or not UTF-8."""
    from catmaps.errors import UserError

    try:
        return sys.stdin.buffer.read().decode() if file == Path("-") else file.read_text(encoding="utf-8")
    except OSError as error:
        mend = f"; name its files, as {file / '*.txt'}" if file.is_dir() else ""
        raise UserError(f"cannot read {file}: {error.strerror}{mend}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from error


def file_texts(command: Score, run: "Run") -> "list[Text]":
    """The texts of the files: one each, or one per line that is not blank."""
    from catmaps.scoring import Text, windows_of

    named: list[tuple[str, str]] = []
    for file in command.files:
        text, name = read_text(file), "standard input" if file == Path("-") else str(file)
        if command.lines:
            named += [(f"{name}:{i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        else:
            named.append((name, text))
    length = run.config.data.length
    return [Text(n, windows_of(run.tokenizer.encode(text), length, command.context), text) for n, text in named]


def split_texts(command: Score, run: "Run") -> "list[Text]":
    from catmaps.errors import UserError
    from catmaps.scoring import Text, Window
    from catmaps.text.shards import sequences
    from catmaps.training.train import find_shards

    assert command.split is not None
    if command.windows < 1:
        raise UserError("--windows must be at least 1")
    if command.context or command.lines:
        raise UserError("--context and --lines belong to files: a split is scored in windows of its own")
    shards, length = find_shards(run.config), run.config.data.length
    count = min(command.windows, len(sequences(shards, command.split, length)))
    rows = sequences(shards, command.split, length, count=count, seed=command.seed)
    return [Text(f"{command.split}:{i}", [Window(row)]) for i, row in enumerate(_tensor(rows), 1)]


def with_best_grid(config: "ScoringConfig", run: "Run") -> "ScoringConfig":
    """The grid that suits the validation split best: never the texts that are scored."""
    from dataclasses import replace

    from catmaps.scoring import best_times
    from catmaps.text.shards import sequences
    from catmaps.training.train import find_shards

    assert config.steps is not None
    shards, length = find_shards(run.config), run.config.data.length
    count = min(32, len(sequences(shards, "valid", length)))
    rows = sequences(shards, "valid", length, count=count, seed=0)
    return replace(config, times=best_times(run, _tensor(rows), config.steps, config.seed))


def write_lines(command: Score, run: "Run", config: "ScoringConfig", scores: "list[TextScore]") -> None:
    import json

    from catmaps.errors import UserError

    assert command.out is not None
    strings = run.tokenizer.token_strings() if command.per_token else []
    how = {"bound": config.bound, "steps": config.steps, "samples_per_window": config.num_samples}
    try:
        with command.out.open("w", encoding="utf-8") as file:
            for score in scores:
                line = {name: None if value != value else value for name, value in score.as_dict().items()}  # no NaN
                details = per_token(score, strings) if command.per_token else {}
                file.write(json.dumps({**line, **how, **details}, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {command.out}: {error.strerror}") from error
    print(f"{len(scores)} texts: {command.out}")


def per_token(score: "TextScore", strings: list[str]) -> dict[str, Any]:
    ids = score.token_ids.tolist()
    return {"token_strings": [strings[i] for i in ids], "bound_nats_per_token": score.token_nats.tolist()}


def _tensor(rows: Any) -> Any:
    import torch

    return torch.from_numpy(rows)


def read(name: str, args: list[str]) -> Score:
    command: Score = parse(Score, args, f"catmaps {name}")
    first = command.run_
    if first == Path("-") or first.is_file():  # a run is a folder: this is the first text
        return replace(command, run_=BASE, files=(first, *command.files))
    return command
