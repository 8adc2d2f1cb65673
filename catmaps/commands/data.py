"""`catmaps data build`, and the two commands that its Slurm scripts call."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from catmaps.cli import parse
from catmaps.errors import UserError

if TYPE_CHECKING:
    from catmaps.text.manifest import Manifest


@dataclass(frozen=True)
class Build:
    """Token shards from text files (.txt, .jsonl, .parquet; folders are searched).

    Whole documents go to train, valid and test by a hash of their name.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Files and folders."""
    out: Path
    """Folder to write."""
    tokenizer: str = "text8"
    """text8 (27 symbols), bytes, bpe:SIZE (trained on the train split), or a tokenizer.json."""
    text_key: str = "text"
    """Field of the text in jsonl and parquet."""
    valid: float = 0.02
    """Share of documents for validation."""
    test: float = 0.04
    """Share of documents for the test split."""
    executor: Literal["inline", "local", "slurm"] = "inline"
    """inline: here and now. local: in tasks, several at a time (extra `scale`). slurm: scripts for an array job are
    written, and nothing is submitted."""
    tasks: int | None = None
    """Parts the files are divided into; None: --workers. Shards depend on it, not on --workers."""
    workers: int = 1
    """Tasks at a time."""
    tokens_per_shard: int = 1 << 28
    """A shard is closed after so many tokens."""
    overwrite: bool = False
    """Replace shards that are in the way."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        if self.executor == "inline":
            if self.tasks is not None or self.workers != 1:
                raise UserError("--tasks and --workers are for --executor local or slurm")
            return _told(self._inline(), self.out)
        if self.workers < 1:
            raise UserError(f"--workers must be at least 1, not {self.workers}")
        from catmaps.text.tasks import join_tasks, run_tasks

        folder = self._planned()
        if self.executor == "slurm":
            from catmaps.text.slurm import write_scripts

            script = write_scripts(folder, self.out, workers=self.workers, overwrite=self.overwrite)
            print(f"scripts: {script.parent}. Next: bash {script}")
            return {"shards": str(self.out), "script": str(script)}
        run_tasks(folder, workers=self.workers)
        return _told(join_tasks(folder, self.out, overwrite=self.overwrite), self.out)

    def _inline(self) -> "Manifest":
        from catmaps.text.build import build_from_paths

        return build_from_paths(
            list(self.paths),
            self.tokenizer,
            self.out,
            text_key=self.text_key,
            valid=self.valid,
            test=self.test,
            tokens_per_shard=self.tokens_per_shard,
            overwrite=self.overwrite,
        )

    def _planned(self) -> Path:
        from catmaps.text.corpus import Reading
        from catmaps.text.tasks import make_plan

        return make_plan(
            self.paths,
            self.tokenizer,
            self.out,
            tasks=self.workers if self.tasks is None else self.tasks,
            reading=Reading(self.text_key, self.valid, self.test),
            tokens_per_shard=self.tokens_per_shard,
            overwrite=self.overwrite,
        )


@dataclass(frozen=True)
class Task:
    """One task of a build that `catmaps data build --executor slurm` planned. Done already, it is left as it is."""

    folder: tyro.conf.Positional[Path]
    """The build's folder, OUT.tasks."""
    task: int
    """Its number, from 0."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from catmaps.text.tasks import run_tasks

        run_tasks(self.folder, only=self.task)
        print(f"task {self.task} of {self.folder} is done")
        return {"folder": str(self.folder), "task": self.task}


@dataclass(frozen=True)
class Join:
    """Makes the parts that tasks wrote one directory of shards."""

    folder: tyro.conf.Positional[Path]
    """The build's folder, OUT.tasks."""
    out: Path
    """Folder to write."""
    overwrite: bool = False
    """Replace shards that are in the way."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from catmaps.text.tasks import join_tasks

        return _told(join_tasks(self.folder, self.out, overwrite=self.overwrite), self.out)


def _told(manifest: "Manifest", out: Path) -> dict[str, Any]:
    splits = {
        name: {"documents": split.documents, "tokens": split.tokens, "characters": split.characters}
        for name, split in manifest.splits.items()
    }
    for name, split in splits.items():
        print(f"{name}: {split['documents']} documents, {split['tokens']} tokens, {split['characters']} characters")
    print(f"shards: {out}. Next: catmaps train small --data.shards {out}")
    return {"shards": str(out), "tokenizer": manifest.tokenizer, "splits": splits}


KINDS = {"build": Build, "task": Task, "join": Join}


def read(name: str, args: list[str]) -> Build | Task | Join:
    if args and args[0] in ("-h", "--help"):
        args = ["build", "--help"]
    if not args or args[0] not in KINDS:
        raise UserError("which data command? there is one to begin with: catmaps data build PATH... --out DIR")
    return parse(KINDS[args[0]], args[1:], f"catmaps {name} {args[0]}")
