"""What works without any extra: with every optional package made impossible to import, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_layering import OPTIONAL

ROOT = Path(__file__).parents[1]
BARE = """
import sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))  # None: an import of it fails
from catmaps.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "MAP", "--num", "2"),
        ("sample", "MAP", "--prompt", "the cat ", "--tokens", "8", "--num", "1"),
        ("score", "MAP", "note.txt"),
        ("show", "MAP", "--html", "flow.html", "--steps", "1"),
        ("info", "MAP"),
        ("export", "MAP", "--out", "exported"),
        ("data", "build", "note.txt", "--valid", "0", "--test", "0", "--out", "shards"),
    ],
    ids=lambda words: " ".join(words),
)
def test_commands_that_need_no_extra(words: tuple[str, ...], tmp_path: Path, map_run: Path) -> None:
    done = bare(tmp_path, *(str(map_run) if word == "MAP" else word for word in words))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "extra"),
    [(("train", "tiny", "--data.shards", "shards", "--out", "run"), "train"), (("serve", "MAP"), "serve")],
)
def test_others_name_theirs(words: tuple[str, ...], extra: str, tmp_path: Path, map_run: Path) -> None:
    if extra == "train":
        (tmp_path / "long.txt").write_text("the cat sat on a mat " * 400)
        bare(tmp_path, "data", "build", "long.txt", "--valid", "0", "--test", "0", "--out", "shards")
    done = bare(tmp_path, *(str(map_run) if word == "MAP" else word for word in words))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"pip install 'catmaps[{extra}]'" in done.stderr


def bare(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "note.txt").write_text("the cat sat on a mat and saw two red fish")
    command = [sys.executable, "-c", BARE, ",".join(sorted(OPTIONAL)), *words]
    surroundings = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=120)
