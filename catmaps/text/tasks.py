"""Building shards of a large corpus in tasks: planned once, run by any number of workers or machines, then joined.

Tasks are runs of the corpus's files, in order. What a task writes depends on its files alone, so shards depend on the
number of tasks (where a task ends, a shard ends) but not on that of workers; the text in them does not depend on
either. Between planning and joining everything lies in OUT.tasks, and a build that broke off goes on from there.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from catmaps.errors import UserError
from catmaps.text import tokenizers
from catmaps.text.build import check_shard_size, check_target, finish, staging, train_texts
from catmaps.text.corpus import Reading, corpus_files, documents_in
from catmaps.text.manifest import Manifest, splits_from
from catmaps.text.pool import Part, pool

PLAN_FILE, PART_FILE, LOGS = "plan.json", "part.json", "logs"
EXTRA = "building in tasks needs datatrove: pip install 'catmaps[scale]'"


@dataclass(frozen=True)
class TaskPlan:
    """What is built, apart from where.

    Attributes:
        files: Path, name in the corpus and bytes of each, in order.
        tasks: Their number, at most that of files.
        reading: How files are read.
        tokenizer: The spec that was asked for.
        tokens_per_shard: See `build_shards`.
    """

    files: tuple[tuple[str, str, int], ...]
    tasks: int
    reading: Reading
    tokenizer: str
    tokens_per_shard: int

    def files_of(self, task: int) -> list[tuple[Path, str]]:
        """Paths and names of a task's files: a run of the corpus, of about as many bytes as any other.

        Raises UserError for a file that has another size than when it was planned.
        """
        total, end = sum(size for _, _, size in self.files), 0
        chosen: list[tuple[Path, str]] = []
        for number, (path, name, size) in enumerate(self.files):
            middle, end = end + size / 2, end + size
            owner = middle * self.tasks / total if total else number * self.tasks / len(self.files)
            if int(owner) == task:
                if not Path(path).is_file() or Path(path).stat().st_size != size:
                    raise UserError(f"{path} is not what was planned ({size} bytes): restore it, or build anew")
                chosen.append((Path(path), name))
        return chosen


def work_folder(out_dir: Path) -> Path:
    """Where the parts of a build lie until they are joined: beside `out_dir`, so that joining copies nothing."""
    return out_dir.with_name(out_dir.name + ".tasks")


def part_folder(folder: Path, task: int) -> Path:
    """Where a task writes."""
    return folder / f"task-{task:05d}"


def make_plan(
    paths: Sequence[Path],
    spec: str,
    out_dir: Path,
    *,
    tasks: int,
    reading: Reading,
    tokens_per_shard: int,
    overwrite: bool = False,
) -> Path:
    """Plans a build, or finds the same one begun before.

    Args:
        paths: Files and folders (see `read_documents`).
        spec: Tokenizer; "bpe:SIZE" is trained here, in one process, on the train documents.
        out_dir: Of the shards, later.
        tasks: How many; more than there are files, or fewer than 1, is an error.
        reading: How files are read.
        tokens_per_shard: See `build_shards`.
        overwrite: Whether `out_dir` may exist.

    Returns:
        The folder of the build, with plan and tokenizer.

    Raises:
        UserError: As `read_documents`; or the folder holds a build of something else.
    """
    check_target(out_dir, overwrite)
    check_shard_size(tokens_per_shard)
    files = tuple((str(file.absolute()), name, file.stat().st_size) for file, name in corpus_files(paths))
    if not 1 <= tasks <= len(files):
        raise UserError(f"{tasks} tasks for {len(files)} files: a task reads whole files; choose 1 to {len(files)}")
    plan, folder = TaskPlan(files, tasks, reading, spec, tokens_per_shard), work_folder(out_dir)
    if (folder / PLAN_FILE).is_file():
        if read_plan(folder) != plan:
            raise UserError(f"{folder} holds a build of other files or options: remove it, or choose another --out")
        return folder
    documents = documents_in([(Path(path), name) for path, name, _ in files], reading)
    tokenizer = tokenizers.from_spec(spec, train_texts(documents))
    try:
        tokenizers.save(tokenizer, folder)
        draft = folder / f".{PLAN_FILE}.draft"
        draft.write_text(json.dumps(asdict(plan), indent=1) + "\n", encoding="utf-8")
        os.replace(draft, folder / PLAN_FILE)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror})") from error
    return folder


def read_plan(folder: Path) -> TaskPlan:
    """The plan of a build. Raises UserError if there is none, or it is damaged."""
    file = folder / PLAN_FILE
    if not file.is_file():
        raise UserError(f"{folder} holds no planned build ({PLAN_FILE} is missing): catmaps data build makes one")
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
        files = tuple((str(path), str(name), int(size)) for path, name, size in content.pop("files"))
        return TaskPlan(files=files, reading=Reading(**content.pop("reading")), **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): remove {folder} and build again") from error


def run_tasks(folder: Path, *, only: int | None = None, workers: int = 1, steps: Sequence[Any] = ()) -> None:
    """Runs the tasks of a planned build that are not done, with datatrove.

    Args:
        folder: See `make_plan`.
        only: One task alone; None: all.
        workers: Processes at a time.
        steps: Further steps of a datatrove pipeline, such as its filters, between reading and tokenising.

    Raises:
        UserError: datatrove is missing, or a task fails as `read_documents` does. Tasks that are done stay so.
    """
    try:
        from catmaps.text.steps import ReadFiles, TaskExecutor, WriteShards
    except ImportError as error:
        raise UserError(EXTRA) from error
    plan = read_plan(folder)
    if only is not None and not 0 <= only < plan.tasks:
        raise UserError(f"there is no task {only}: {folder} has tasks 0 to {plan.tasks - 1}")
    first, count = (0, plan.tasks) if only is None else (only, 1)
    marks = folder / LOGS / "completions"
    marks.mkdir(parents=True, exist_ok=True)
    for task in range(first, first + count):  # whatever datatrove's marks say: it may end before it makes one
        if (part_folder(folder, task) / PART_FILE).is_file():
            (marks / f"{task:05d}").touch()
        else:
            (marks / f"{task:05d}").unlink(missing_ok=True)
    executor = TaskExecutor(
        pipeline=[ReadFiles(plan), *steps, WriteShards(plan, folder)],
        tasks=plan.tasks,
        workers=min(workers, count),
        local_tasks=count,
        local_rank_offset=first,
        logging_dir=str(folder / LOGS),
    )
    executor.run()


def join_tasks(folder: Path, out_dir: Path, *, overwrite: bool = False) -> Manifest:
    """Makes the parts of a build one directory of shards, and removes the build's folder.

    Shards are linked, not copied, where the file system can.

    Raises:
        UserError: Not all tasks are done; or as `build_shards`.
    """
    plan = read_plan(folder)
    missing = [task for task in range(plan.tasks) if not (part_folder(folder, task) / PART_FILE).is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {plan.tasks} tasks are not done, the first is task {missing[0]}: run them")
    parts = [_part(part_folder(folder, task)) for task in range(plan.tasks)]
    if not any("train" in part.splits for part in parts):
        raise UserError(
            "no document fell into train: lower the held-out shares, cut the text into more documents, or give each "
            'a "split" field'
        )
    tokenizer = tokenizers.load(folder)
    with staging(out_dir, overwrite) as draft:
        manifest = finish(draft, tokenizer, pool(parts, draft, _link))
    shutil.rmtree(folder)
    return manifest


def _part(directory: Path) -> Part:
    file = directory / PART_FILE
    try:
        return Part(directory, splits_from(json.loads(file.read_bytes())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): remove {directory} and run its task again") from error


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
