"""`catmaps show`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from catmaps.cli import parse

if TYPE_CHECKING:
    from catmaps.infill import Template
    from catmaps.model import Run


@dataclass(frozen=True)
class Show:
    """One HTML file on which a text can be watched as it forms, in several numbers of steps side by side: tokens
    coloured by confidence over time, with their alternatives. It needs no server and no network.
    """

    run_: tyro.conf.Positional[Path]
    """Folder of a run."""
    html: Path
    """The file to write."""
    prompt: str = ""
    """Text to go on from."""
    infill: str | None = None
    """Text with blanks, [[N]] for N tokens, instead."""
    tokens: int | None = None
    """Tokens to write after the prompt; default: half of the run's window, all of it without a prompt."""
    steps: tuple[int, ...] = (1, 4, 64)
    """Steps of the sampler, a text each."""
    sampler: Literal["flow_map", "euler", "heun", "renoise", "localisation"] | None = None
    temperature: float = 1.0
    """Divides the logits and multiplies the variance of the first noise."""
    seed: int = 0
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from catmaps.errors import UserError
        from catmaps.generation import default_sampling
        from catmaps.server.pieces import Settings
        from catmaps.server.service import served_run
        from catmaps.server.show import trajectory, write_page

        if not self.steps or min(self.steps) < 1:
            raise UserError("--steps takes numbers of at least 1, as in --steps 1 4 64")
        if self.temperature <= 0:
            raise UserError(f"--temperature must be above 0, not {self.temperature}")
        if not self.html.absolute().parent.is_dir():
            raise UserError(f"cannot write {self.html}: no folder {self.html.parent}")
        run, model, _ = served_run(self.run_)
        template, strings = self._template(run), run.tokenizer.token_strings()
        sampler = self.sampler or default_sampling(run).sampler
        trajectory(run, template, Settings(sampler, 1, 1.0, 1.0), self.seed, strings)  # the first is the slowest
        panels = [
            trajectory(run, template, Settings(sampler, steps, self.temperature, 1.0), self.seed, strings)
            for steps in self.steps
        ]
        write_page(run, model, panels, self.html)
        print(f"open {self.html}")
        seconds = {str(panel["steps"]): panel["seconds"] for panel in panels}
        return {
            "run": str(self.run_),
            "html": str(self.html),
            "sampler": sampler,
            "seed": self.seed,
            "seconds": seconds,
        }

    def _template(self, run: "Run") -> "Template":
        from catmaps.errors import UserError
        from catmaps.server.asks import blanks
        from catmaps.server.show import template_after

        if self.infill is not None:
            if self.prompt or self.tokens is not None:
                raise UserError("--infill stands for --prompt and --tokens: leave these out")
            return blanks(self.infill, run)
        window = run.config.data.length
        tokens = self.tokens if self.tokens is not None else max(1, window // 2) if self.prompt else window
        if tokens < 1:
            raise UserError(f"--tokens must be at least 1, not {tokens}")
        return template_after(self.prompt, tokens, run)


def read(name: str, args: list[str]) -> Show:
    return parse(Show, args, f"catmaps {name}")
