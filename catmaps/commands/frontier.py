"""`catmaps frontier`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from catmaps.cli import parse


@dataclass(frozen=True)
class Frontier:
    """Quality against diversity: a run's texts over temperatures and network calls, beside held-out text and controls.

    Writes frontier.csv, frontier.json and frontier.png. Rows in the CSV are not drawn again: interrupt and repeat the
    command at will, add temperatures or steps. A low temperature flatters any model, so curves are also read at the
    token entropy of held-out text, where they reach it.
    """

    run_: tyro.conf.Positional[Path]
    """Folder of a run."""
    base: Path | None = None
    """A second run to compare with, such as a map's base."""
    out: Path | None = None
    """Folder to write; default: frontier in the run's folder."""
    temperatures: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
    steps: tuple[int, ...] = ()
    """Numbers of steps; default: 1 2 4 8 for a map, 64 for any other run."""
    sampler: Literal["flow_map", "euler", "heun", "renoise", "localisation"] | None = None
    """Default: the run's own, as in `catmaps sample`."""
    noise: float | None = None
    """Variance of the noise that renoise adds, as in `catmaps sample`."""
    base_steps: tuple[int, ...] = (64,)
    """Numbers of steps of --base."""
    num: int = 256
    """Samples per row."""
    texts: int = 32
    """Long texts per row, of 1,024 characters, for entropy and repetition."""
    seed: int = 0
    batch: int = 64
    """Texts drawn together."""
    judge: str | None = None
    """Also a causal language model: a name on the Hugging Face hub, a directory, or smollm2 (see `catmaps judge`)."""
    judge_precision: Literal["float32", "bfloat16", "float16"] = "float32"
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        import json
        from dataclasses import asdict

        from rich.console import Console

        from catmaps.commands.progress import progress
        from catmaps.errors import UserError
        from catmaps.evaluation.frontier import control_tasks, run_tasks, trace
        from catmaps.evaluation.frontier_plot import write_plot
        from catmaps.evaluation.matched import matched
        from catmaps.evaluation.quality import HELDOUT
        from catmaps.model import load_run

        if self.num < 10 or self.texts < 2 or self.batch < 1 or min((*self.steps, *self.base_steps, 1)) < 1:
            raise UserError("--num must be at least 10, --texts 2, --batch and all steps 1")
        if not self.temperatures or min(self.temperatures) <= 0:
            raise UserError("--temperatures must be positive, and at least one")
        run = load_run(self.run_)
        base = load_run(self.base) if self.base is not None else None
        setting = make_setting(self, run, base)
        out = self.out or self.run_ / "frontier"
        names = distinct_names([self.run_] + ([self.base] if self.base is not None else []))
        temperatures = sorted(set(self.temperatures))
        tasks = control_tasks(setting)
        steps = self.steps or ((1, 2, 4, 8) if run.is_map else (64,))
        tasks += run_tasks(setting, run, names[0], ways(run, steps, self.batch, self.sampler, self.noise), temperatures)
        if base is not None:
            tasks += run_tasks(setting, base, names[1], ways(base, self.base_steps, self.batch), temperatures)
        with progress(len(tasks)) as report:
            rows = trace(
                tasks, setting, out / "frontier.csv", report=lambda name, new: report(name if new else f"{name} (kept)")
            )
        real = next(row for row in rows if row.series == HELDOUT)
        at_entropy = matched(rows, real.entropy)
        write_plot(out / "frontier.png", rows, f"{' and '.join(names)}: quality against diversity over temperature")
        Console().print(table(rows))
        print(
            f"At the token entropy of held-out text, {real.token_entropy:.3f} ± {real.token_entropy_stderr:.3f} nats:"
        )
        for one in at_entropy:
            print(f"  {one}")
        print(f"written: {out}/frontier.csv, .json, .png")
        result = {
            "run": str(self.run_),
            "base": str(self.base) if self.base is not None else None,
            "judge": setting.causal.id if setting.causal else None,
            "heldout": asdict(real),
            "matched": [one.as_dict() for one in at_entropy],
            "rows": [asdict(row) for row in rows],
        }
        text = json.dumps(result, indent=1, allow_nan=False)
        (out / "frontier.json").write_text(text + "\n", encoding="utf-8")
        return {**result, "csv": str(out / "frontier.csv"), "png": str(out / "frontier.png")}


def make_setting(command: Frontier, run: Any, base: Any) -> Any:
    """Judges and sizes that all rows share; UserError where the two runs do not compare."""
    from catmaps.errors import UserError
    from catmaps.evaluation.causal_judge import load_causal_judge
    from catmaps.evaluation.collect import apart, build_judge, judge_length
    from catmaps.evaluation.fetch_judge import resolve
    from catmaps.evaluation.frontier import Setting
    from catmaps.evaluation.frontier_rows import digest
    from catmaps.model import best_device
    from catmaps.text.manifest import MANIFEST_FILE
    from catmaps.training.train import cache_folder, find_shards

    shards = find_shards(run.config)
    if base is not None:
        if base.config.data.length != run.config.data.length:
            lengths = f"{run.config.data.length} and {base.config.data.length}"
            raise UserError(f"the runs write {lengths} tokens: their figures do not compare; choose another --base")
        if digest(find_shards(base.config) / MANIFEST_FILE) != digest(shards / MANIFEST_FILE):
            raise UserError(f"{command.base} was trained on other data than {command.run_}: choose another --base")
    causal = None
    if command.judge is not None:
        name = resolve(command.judge, cache_folder())
        causal = load_causal_judge(name, precision=command.judge_precision, device=best_device(), alias=command.judge)
    judge = build_judge(shards, run.tokenizer, cache_folder())
    return Setting(
        judge=apart(run, judge, command.num),
        causal=causal,
        length=judge_length(run, judge),
        num=command.num,
        num_texts=command.texts,
        seed=command.seed,
        corpus=digest(shards / MANIFEST_FILE),
    )


def ways(
    run: Any, steps: tuple[int, ...], batch: int, sampler: str | None = None, noise: float | None = None
) -> list[Any]:
    """The run's own way of sampling, or another sampler or noise, at each number of steps."""
    from dataclasses import replace

    from catmaps.generation import default_sampling

    own = [replace(default_sampling(run, n), batch=batch) for n in steps]
    named = [replace(one, sampler=sampler or one.sampler, noise=noise) for one in own]
    return list({way.steps: way for way in named}.values())  # an autoregressive run knows one number of steps


def distinct_names(folders: list[Path]) -> list[str]:
    """The folders' own names, or their whole paths if those are the same."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def table(rows: Any) -> Any:
    """The main figures, narrow enough for any terminal; the CSV has them all."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    judged = any(row.judge_bits is not None for row in rows)
    out = Table(
        title="* flattered: repeats itself more than held-out text",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    out.add_column("texts", no_wrap=True)
    headings = ["temp.", "forward\nbits", *(["judge\nbits", "gen-\nPPL"] if judged else []), "token\nentropy"]
    for heading in (*headings, "repeats", "near-\nness"):
        out.add_column(heading, justify="right")
    for row in rows:
        name = row.series if row.temperature is None else f"{row.series}, {row.steps}"
        judge = (f"{row.judge_bits:.3f}", f"{row.judge_gen_ppl:.0f}") if row.judge_bits is not None else ("", "")
        out.add_row(
            escape(name) + (" *" if row.flattered else ""),
            "" if row.temperature is None else f"{row.temperature:g}",
            f"{row.forward_bits:.3f}",
            *(judge if judged else ()),
            f"{row.token_entropy:.3f}",
            f"{row.repetition_rate:.1%}",
            f"{row.divergence:.3f}",
        )
    return out


def read(name: str, args: list[str]) -> Frontier:
    return parse(Frontier, args, f"catmaps {name}")
