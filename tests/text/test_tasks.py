"""Shards built in tasks: the text does not depend on tasks, the shards not on workers, and a broken build goes on."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import catmaps
from catmaps import cli
from catmaps.errors import UserError
from catmaps.text import tokenizers
from catmaps.text.build import build_from_paths
from catmaps.text.corpus import Reading
from catmaps.text.manifest import Manifest
from catmaps.text.shards import load_boundaries, load_tokens, token_counts, verify
from catmaps.text.tasks import LOGS, PART_FILE, join_tasks, make_plan, part_folder, read_plan, run_tasks, work_folder

pytest.importorskip("datatrove")
WORDS = ("sea", "ship", "whale", "Captain", "and", "the", "of", "né", "7")


def words(seed: int, count: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Eight files of three kinds, 97 documents."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for i in range(5):
        (folder / f"{i}.txt").write_text(words(i, 50))
    for name, first in (("a.jsonl", 10), ("deep/b.jsonl", 50)):
        lines = [json.dumps({"text": words(first + i, 30)}) + "\n" for i in range(40)]
        (folder / name).write_text("".join(lines))
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": words(200 + i, 20), "id": f"c{i}"}) + "\n" for i in range(12))
    return folder


def planned(corpus: Path, out: Path, tasks: int, spec: str = "bytes", tokens_per_shard: int = 2000) -> Path:
    reading = Reading("text", 0.1, 0.1)
    return make_plan([corpus], spec, out, tasks=tasks, reading=reading, tokens_per_shard=tokens_per_shard)


def built(corpus: Path, out: Path, tasks: int, workers: int, spec: str = "bytes") -> Manifest:
    folder = planned(corpus, out, tasks, spec)
    run_tasks(folder, workers=workers)
    manifest = join_tasks(folder, out)
    assert not folder.exists()
    return manifest


@pytest.mark.parametrize("spec", ["text8", "bytes", "bpe:300"])
def test_the_text_does_not_depend_on_tasks(spec: str, corpus: Path, tmp_path: Path) -> None:
    inline = build_from_paths([corpus], spec, tmp_path / "inline", valid=0.1, test=0.1, tokens_per_shard=2000)
    for tasks in (1, 3):
        out = tmp_path / f"{tasks}"
        manifest = built(corpus, out, tasks, 1, spec)
        assert verify(out).tokenizer_sha256 == inline.tokenizer_sha256
        assert set(manifest.splits) == {"train", "valid", "test"}
        for name, split in inline.splits.items():
            ours = manifest.split(name)
            same = (ours.documents, ours.characters, ours.bytes)
            assert same == (split.documents, split.characters, split.bytes)
            assert load_tokens(out, name).tolist() == load_tokens(tmp_path / "inline", name).tolist()
            assert load_boundaries(out, name).tolist() == load_boundaries(tmp_path / "inline", name).tolist()
            assert token_counts(out, name).tolist() == token_counts(tmp_path / "inline", name).tolist()
        if tasks == 1:
            assert manifest == inline


def test_shards_do_not_depend_on_workers(corpus: Path, tmp_path: Path) -> None:
    one = built(corpus, tmp_path / "one", 4, 1)
    two = built(corpus, tmp_path / "two", 4, 2)
    assert one == two == verify(tmp_path / "two")
    assert len(one.split("train").shards) >= 4
    assert [path.name for path in tmp_path.iterdir() if ".tasks" in path.name] == []


def test_every_file_belongs_to_one_task(corpus: Path, tmp_path: Path) -> None:
    for tasks in (1, 2, 3, 8):
        plan = read_plan(planned(corpus, tmp_path / str(tasks), tasks))
        given = [file for task in range(tasks) for file in plan.files_of(task)]
        assert [name for _, name in given] == [name for _, name, _ in plan.files]
    with pytest.raises(UserError, match="0 tokens per shard are too few"):
        planned(corpus, tmp_path / "none", 2, tokens_per_shard=0)
    for tasks in (0, 9):
        with pytest.raises(UserError, match="choose 1 to 8"):
            planned(corpus, tmp_path / "none", tasks)


def test_a_bad_record_is_one_line_and_the_build_goes_on_after_it(corpus: Path, tmp_path: Path) -> None:
    whole = built(corpus, tmp_path / "whole", 4, 1)
    good = (corpus / "c.jsonl.gz").read_bytes()
    with gzip.open(corpus / "c.jsonl.gz", "wt") as file:
        file.write("{\n")
    bad = (corpus / "c.jsonl.gz").read_bytes()
    (corpus / "c.jsonl.gz").write_bytes(bad + bytes(len(good) - len(bad)))  # as many bytes: gzip takes zeros at the end
    out = tmp_path / "out"
    folder = planned(corpus, out, 4)
    with pytest.raises(UserError, match=r"c\.jsonl\.gz, line 1 is not JSON"):
        run_tasks(folder, workers=2)
    with pytest.raises(UserError, match="of 4 tasks are not done"):
        join_tasks(folder, out)
    assert not out.exists()
    done = [task for task in range(4) if (part_folder(folder, task) / PART_FILE).is_file()]
    assert 0 < len(done) < 4
    stamps = {task: (part_folder(folder, task) / PART_FILE).stat().st_mtime_ns for task in done}
    (corpus / "c.jsonl.gz").write_bytes(good)
    (folder / LOGS / "completions" / f"{done[0]:05d}").unlink(missing_ok=True)  # as if it was ended before that
    assert planned(corpus, out, 4) == folder
    run_tasks(folder, workers=1)
    assert all((part_folder(folder, task) / PART_FILE).stat().st_mtime_ns == stamps[task] for task in done)
    assert join_tasks(folder, out) == whole


def test_a_part_that_was_removed_is_made_again(corpus: Path, tmp_path: Path) -> None:
    folder = planned(corpus, tmp_path / "out", 3)
    run_tasks(folder)
    shutil.rmtree(part_folder(folder, 1))
    with pytest.raises(UserError, match=r"1 of 3 tasks are not done, the first is task 1"):
        join_tasks(folder, tmp_path / "out")
    run_tasks(folder, only=1)
    (part_folder(folder, 2) / PART_FILE).write_text("{")
    with pytest.raises(UserError, match=r"task-00002/part\.json is damaged .* run its task again"):
        join_tasks(folder, tmp_path / "out")
    shutil.rmtree(part_folder(folder, 2))
    run_tasks(folder)
    assert join_tasks(folder, tmp_path / "out") == built(corpus, tmp_path / "other", 3, 1)


def test_another_build_is_not_gone_on_with(corpus: Path, tmp_path: Path) -> None:
    folder = planned(corpus, tmp_path / "out", 2)
    with pytest.raises(UserError, match="holds a build of other files or options"):
        planned(corpus, tmp_path / "out", 3)
    (corpus / "0.txt").write_text("shorter")
    with pytest.raises(UserError, match=r"0\.txt is not what was planned"):
        run_tasks(folder)
    with pytest.raises(UserError, match="there is no task 2"):
        run_tasks(folder, only=2)
    with pytest.raises(UserError, match="holds no planned build"):
        run_tasks(tmp_path)


def test_steps_of_datatrove_go_between(corpus: Path, tmp_path: Path) -> None:
    from datatrove.data import Document as Item

    def without_ships(data: Iterator[Item], rank: int, world_size: int) -> Iterator[Item]:
        return (item for item in data if "ship" not in item.text)

    folder = planned(corpus, tmp_path / "out", 2)
    run_tasks(folder, steps=[without_ships])
    join_tasks(folder, tmp_path / "out")
    text = tokenizers.load(tmp_path / "out").decode(load_tokens(tmp_path / "out", "train"))
    assert "whale" in text
    assert "ship" not in text


SBATCH = """#!/usr/bin/env bash
# A cluster that runs array jobs at once, the last one first.
script="${@: -1}"
echo "$*" >> "$JOBS"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$script")
for i in $(seq "${last:-0}" -1 0); do SLURM_ARRAY_TASK_ID=$i bash "$script" >> "$JOBS.out" || exit 1; done
echo "4711;cluster"
"""


def test_slurm_scripts_build_what_one_machine_builds(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--tokenizer", "bytes", "--valid", "0.1", "--test", "0.1", "--tokens-per-shard", "2000"]
    command = ["data", "build", str(corpus), "--out", str(out), *options, "--executor", "slurm", "--tasks", "4"]
    assert cli.main([*command, "--workers", "3"]) == 0
    folder = work_folder(out)
    assert not out.exists()
    assert not part_folder(folder, 0).exists()
    script = (folder / "tasks.sbatch").read_text()
    assert "#SBATCH --array=0-3%3\n" in script
    assert f"exec {sys.executable} -m catmaps data task {folder} --task" in script
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    environment = {
        "PATH": f"{sbatch.parent}:{os.environ['PATH']}",
        "JOBS": str(tmp_path / "jobs"),
        "PYTHONPATH": str(Path(catmaps.__file__).parents[1]),
    }
    done = subprocess.run(
        ["bash", str(folder / "submit.sh")], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "jobs").read_text().splitlines()
    assert first == f"--parsable {folder}/tasks.sbatch"
    assert second == f"--dependency=afterok:4711 {folder}/join.sbatch"
    assert verify(out) == built(corpus, tmp_path / "here", 4, 1)


def test_the_command_builds_with_workers(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "build", str(corpus), "--tokenizer", "bytes", "--json"]
    assert cli.main([*command, "--out", str(tmp_path / "a"), "--executor", "local", "--workers", "2"]) == 0
    tasks = json.loads(capsys.readouterr().out)
    assert cli.main([*command, "--out", str(tmp_path / "b")]) == 0
    inline = json.loads(capsys.readouterr().out)
    assert tasks["splits"] == inline["splits"]
    assert cli.main([*command, "--out", str(tmp_path / "c"), "--tasks", "2"]) == 2
    assert "--tasks and --workers are for --executor" in capsys.readouterr().err
