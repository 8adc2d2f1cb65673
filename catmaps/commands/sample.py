"""`catmaps sample`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from catmaps.cli import parse
from catmaps.models import DEFAULT

if TYPE_CHECKING:
    from catmaps.generation import SamplingConfig
    from catmaps.model import Run


@dataclass(frozen=True)
class Sample:
    """Write texts. A map jumps (renoise, 4 steps); a base is followed (euler, 64 steps), as are baselines (64 steps;
    autoregressive: one call per token). A prompt is gone on from; a text with blanks is filled in.
    """

    run_: tyro.conf.Positional[Path] = DEFAULT
    """Folder of a run; `words` and `letters` come with the package."""
    steps: int | None = None
    """Steps of the sampler: network calls (heun: 2 steps - 1)."""
    num: int = 8
    """How many texts."""
    seed: int = 0
    sampler: Literal["flow_map", "euler", "heun", "renoise", "localisation"] | None = None
    temperature: float = 1.0
    """Multiplies the variance of the first noise and, but for renoise, divides the logits: below 1 is cleaner and less
    diverse."""
    noise: float | None = None
    """Variance of the noise that renoise adds, 1 being the path's: below, texts are likelier and in the end less
    diverse. Default: 0.5, in N > 4 steps 1 - 2 / N; 1 for imported maps."""
    length: int | None = None
    """Tokens per text; default: as in training."""
    prompt: str | None = None
    """Text to go on from."""
    tokens: int | None = None
    """Tokens to write after the prompt; default: half of the run's window."""
    stop: tuple[str, ...] = ()
    """Strings that end a text after the prompt."""
    infill: str | None = None
    """Text with blanks, [[N]] for N tokens; the rest of it stays as it is."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this share of every endpoint."""
    guidance: float = 1.0
    """Above 1: further from what the run says without seeing the prompt, or from `--weak`. Twice the calls."""
    weak: Path | None = None
    """A weaker run of the same alphabet, such as a smaller one, for guidance."""
    batch: int = 64
    """Texts drawn together."""
    show_trajectory: bool = False
    """Also print the likeliest text after every step of the first sample."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        import time

        from catmaps.model import load_run

        self._check()
        run = load_run(self.run_)
        config = self._config(run)
        drafts: list[tuple[float, str]] = []
        began, texts = time.monotonic(), []
        for text in self._texts(run, config, drafts):
            texts.append(text)
            print(f"[{len(texts)}] {self.prompt or ''}{text}")
        return {
            "run": str(self.run_),
            "sampler": config.sampler,
            "steps": config.steps,
            "network_calls": config.calls,
            "seed": self.seed,
            "temperature": self.temperature,
            "noise": config.variance(run),
            "top_p": self.top_p,
            "guidance": self.guidance,
            "weak": None if self.weak is None else str(self.weak),
            "prompt": self.prompt,
            "infill": self.infill,
            "seconds": time.monotonic() - began,
            "texts": texts,
            "trajectory": [{"t": t, "text": text} for t, text in drafts],
        }

    def _check(self) -> None:
        from catmaps.errors import UserError

        if self.num < 1 or (self.length is not None and self.length < 1):
            raise UserError("--num and --length must be at least 1")
        if self.tokens is not None and self.tokens < 1:
            raise UserError("--tokens must be at least 1")
        if self.prompt is not None and self.infill is not None:
            raise UserError("--prompt or --infill, not both: --infill 'text [[N]]' goes on from a text as well")
        if self.prompt is None and (self.tokens is not None or self.stop):
            raise UserError("--tokens and --stop are for --prompt; --length sets the tokens of other texts")
        given = self.prompt is not None or self.infill is not None
        if given and (self.length is not None or self.show_trajectory):
            raise UserError("--length and --show-trajectory are for texts without --prompt and --infill")
        if not given and self.guidance != 1 and self.weak is None:
            raise UserError("--guidance needs something to lead away from: --weak RUN, or a --prompt or --infill")
        if self.weak is not None and self.guidance == 1:
            raise UserError("--weak is for --guidance above 1")

    def _config(self, run: Run) -> SamplingConfig:
        from catmaps.errors import UserError
        from catmaps.generation import default_sampling
        from catmaps.model import load_run

        if run.baseline is not None and self.show_trajectory:
            raise UserError(f"run {self.run_} is a {run.kind}, which has no trajectory; leave out --show-trajectory")
        if run.baseline is not None and run.baseline.sequential and self.steps is not None:
            raise UserError(f"run {self.run_} makes one call per token; leave out --steps")
        config = default_sampling(run, self.steps)
        if self.sampler is not None:
            config = replace(config, sampler=self.sampler)
        if self.noise is not None:
            config = replace(config, noise=self.noise)
        weak = None if self.weak is None else load_run(self.weak)
        if weak is not None and weak.tokenizer.token_strings() != run.tokenizer.token_strings():
            raise UserError(f"--weak {self.weak} has another alphabet ({weak.tokenizer.name}) than {self.run_}")
        options = {"seed": self.seed, "temperature": self.temperature, "batch": self.batch, "top_p": self.top_p}
        return replace(config, **options, guidance=self.guidance, weak=None if weak is None else weak.flow_map)

    def _texts(self, run: Run, config: SamplingConfig, drafts: list[tuple[float, str]]) -> Iterator[str]:
        from catmaps.generation import generate
        from catmaps.infill import Template, fill, go_on

        def watch(t: float, endpoint: Any) -> None:
            if len(drafts) < config.steps:
                drafts.append((t, run.tokenizer.decode(endpoint[0].argmax(-1).cpu().numpy())))
                print(f"t = {t:.3f}  {drafts[-1][1]}")

        if self.prompt is not None:
            tokens = self.tokens or max(1, run.config.data.length // 2)
            yield from go_on(run, self.prompt, tokens, self.num, config, stops=self.stop)
            return
        if self.infill is not None:
            batches = fill(run, Template.read(self.infill, run.tokenizer), self.num, config)
        else:
            batches = generate(run, self.num, config, length=self.length, watch=watch if self.show_trajectory else None)
        for batch in batches:
            for row in batch:
                yield run.tokenizer.decode(row.numpy())


def read(name: str, args: list[str]) -> Sample:
    return parse(Sample, args, f"catmaps {name}")
