"""Building shards as steps of a datatrove pipeline: read files, then whatever steps between, then write shards.

Imported only by who runs a pipeline: it needs the extra `scale`.
"""

import io
import json
import os
import shutil
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import redirect_stderr
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datatrove.data import Document as Item
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from catmaps.text import tokenizers
from catmaps.text.build import write_splits
from catmaps.text.corpus import Document, documents_in
from catmaps.text.tasks import PART_FILE, TaskPlan, part_folder

__all__ = ["ReadFiles", "TaskExecutor", "WriteShards"]


class ReadFiles(PipelineStep):
    """Yields the documents of a task's files; id, source, title and split as `read_documents` gives them."""

    name, type = "catmaps files", "READER"

    def __init__(self, plan: TaskPlan) -> None:
        super().__init__()
        self.plan = plan

    def run(self, data: Iterable[Item] | None, rank: int = 0, world_size: int = 1) -> Generator[Item, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Documents of the files of task `rank`; `data`, what a step before yields, come first."""
        yield from data or ()
        assert world_size == self.plan.tasks
        for document in documents_in(self.plan.files_of(rank), self.plan.reading):
            about = {"source": document.source, "title": document.title, "split": document.split}
            yield Item(text=document.text, id=document.id, metadata=about)


class WriteShards(PipelineStep):
    """Writes a task's documents as shards into its folder, whole: what an earlier try left there is removed."""

    name, type = "catmaps shards", "WRITER"

    def __init__(self, plan: TaskPlan, folder: Path) -> None:
        super().__init__()
        self.plan, self.folder = plan, folder

    def run(self, data: Iterable[Item] | None, rank: int = 0, world_size: int = 1) -> Generator[Item, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Writes, and yields nothing."""
        yield from ()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a task is one core's work: others have the rest
        target = part_folder(self.folder, rank)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        splits = write_splits(
            self._documents(data or ()),
            tokenizers.load(self.folder),
            target,
            self.plan.tokens_per_shard,
            follows=rank > 0,
        )
        content = {name: asdict(split) for name, split in splits.items()}
        draft = target / f".{PART_FILE}.draft"  # whole or absent: the part is done when it is there
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, target / PART_FILE)
        for split in splits.values():
            self.stat_update("tokens", value=split.tokens, unit="task")

    def _documents(self, data: Iterable[Item]) -> Iterator[Document]:
        for item in data:
            about = item.metadata
            yield Document(str(item.id), about["source"], about["title"], item.text, about["split"])
            self.stat_update("documents")


class _Nowhere(io.TextIOBase):
    """Takes what datatrove's log would write on stderr; it stays open, for the log is set up anew after each task."""

    def write(self, text: str, /) -> int:
        return len(text)


class TaskExecutor(LocalPipelineExecutor):
    """datatrove's executor on this machine, whose log goes to files alone: our own errors are one line."""

    def run(self) -> Any:
        """All tasks that are not done."""
        with redirect_stderr(_Nowhere()):
            return super().run()

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        with redirect_stderr(_Nowhere()):
            stats = super()._run_for_rank(rank, local_rank, node_rank)
        print(f"task {rank} of 0 to {self.tasks - 1} is done", file=sys.__stderr__)
        return stats
