"""Documentation: every `catmaps` command in it is one that the command line takes; the tutorial's are run, in order."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from catmaps.cli import COMMANDS, Helped
from catmaps.config import Config, to_json
from catmaps.errors import UserError
from catmaps.presets import PRESETS
from catmaps.text.tokenizers import Text8Tokenizer, save

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "studies" / "README.md"])
HISTORY = {"CHANGELOG.md", "log.md"}  # which name options of their time
TUTORIAL = ROOT / "docs" / "tutorial.md"
SHELL = {"", "bash", "console"}
ENDS = {"|", ">", ">>", "<", "<<", "&&", "||", ";", "&", ")", "2>&1"}
LAUNCHERS = (r"(?:\w+=\S* )*", r"torchrun .*?-m ", r"python -m ")


def blocks(page: Path) -> list[str]:
    """The fenced blocks of a page that are for a shell, or of no stated kind."""
    found = re.findall(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [text for _, kind, text in found if kind in SHELL]


def lines(page: Path) -> list[str]:
    """The lines of such blocks, continued ones joined; and inline code that has options and no placeholder."""
    joined = [line.strip() for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    inline = [" ".join(code.split()) for code in re.findall(r"`(catmaps [^`]+)`", prose)]
    return joined + [code for code in inline if " --" in code and not re.search(r"\.\.\.|\w\|\w|\bCOMMAND\b|…", code)]


def command(line: str) -> list[str] | None:
    """The words after `catmaps` up to what is the shell's own; None if the line starts something else."""
    line = line.removeprefix("$ ")
    started = re.match(rf"(?:{'|'.join(LAUNCHERS)})*catmaps (?=\S)", line)
    if started is None:
        return None
    lexer = shlex.shlex(line[started.end() :], posix=True, punctuation_chars="|<>;&")
    lexer.whitespace_split = True
    words = list(lexer)
    return words[: next((at for at, word in enumerate(words) if word in ENDS), len(words))]


def everywhere() -> list[tuple[str, list[str]]]:
    """(page, words) of every command, each once a page; the examples of --help are a page."""
    pages = {page.relative_to(ROOT).as_posix(): lines(page) for page in PAGES if page.name not in HISTORY}
    pages["--help"] = [f"catmaps {example}" for entry in COMMANDS.values() for example in entry.examples]
    found = [(where, words) for where, said in pages.items() for line in said if (words := command(line))]
    return [pair for at, pair in enumerate(found) if pair not in found[:at]]


def make_what_is_read(words: list[str]) -> None:
    """Runs whose configuration a command's parser looks at: those to distil from, and to plan."""
    named = [after for word, after in pairwise(words) if word == "--from"]
    if words[0] == "plan" and words[1] not in PRESETS:
        named.append(words[1])
    for folder in named:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(to_json(Config()))
        save(Text8Tokenizer(), Path(folder))


def parsed(words: list[str]) -> None:
    """Reads a command as `catmaps` would, without running it."""
    assert words[0] in COMMANDS, f"no command {words[0]}"
    make_what_is_read(words)
    try:
        importlib.import_module(f"catmaps.commands.{COMMANDS[words[0]].module}").read(words[0], words[1:])
    except Helped:
        pass
    except UserError as error:
        pytest.fail(str(error))


@pytest.mark.parametrize(("where", "words"), everywhere(), ids=str)
def test_the_command_line_takes_every_command_of_the_documentation(
    where: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del where  # in the test's name
    monkeypatch.chdir(tmp_path)
    parsed(words)


def test_a_wrong_option_or_command_is_found() -> None:
    with pytest.raises(pytest.fail.Exception, match="--stepz"):
        parsed(["sample", "runs/map", "--stepz", "3"])
    with pytest.raises(AssertionError, match="no command fly"):
        parsed(["fly"])


def test_commands_are_found_in_all_their_forms(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "Inline `catmaps plan 1.7b --gpus 2`, not `catmaps train` or `catmaps sample RUN|DIR --num 2`.\n"
        "```\n$ catmaps sample runs/map --prompt 'a | b' --num 2 | head   # a word\nA=1 catmaps info runs/map > x\n"
        "torchrun --nnodes 2 \\\n  -m catmaps train small\ncat catmaps\n```\n```python\ncatmaps nothing\n```\n"
    )
    assert [words for line in lines(tmp_path / "page.md") if (words := command(line))] == [
        ["sample", "runs/map", "--prompt", "a | b", "--num", "2"],
        ["info", "runs/map"],
        ["train", "small"],
        ["plan", "1.7b", "--gpus", "2"],
    ]


def test_the_site_builds_strictly_and_needs_no_other(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("needs the extra docs")
    site = tmp_path / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    surroundings = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert {"index.html", "tutorial.html", "concepts.html", "api/flow.html"} <= pages.keys()
    assert "catmaps.flow.flow_map.FlowMap.jump" in pages["api/flow.html"]
    fetched = r'<(?:script|img|link|iframe)[^>]+(?:src|href)="?(?:https?:)?//'
    assert [name for name, page in pages.items() if re.search(fetched, page)] == []


SMALL = """\
#!/bin/sh
# The tutorial's commands with sizes for a test.
case "$*" in
  *--resume*|train*--from*) ;;
  train*) set -- "$@" --network.width 32 --network.blocks 1 --network.heads 2 ;;
  report*) set -- "$@" --num 16 --windows 8 --calls 1 2 ;;
esac
case "$*" in
  *--resume*) ;;
  train*|distill*) set -- "$@" --training.steps 12 --training.batch 8 --training.micro-batch 8 \
    --training.compile False --training.evaluate-every 12 --training.evaluate-sequences 8 ;;
esac
exec "{python}" -m catmaps "$@"
"""


def test_the_tutorial_runs_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("olmo_core")
    pytest.importorskip("matplotlib")
    catmaps = tmp_path / "bin" / "catmaps"
    catmaps.parent.mkdir()
    catmaps.write_text(SMALL.format(python=sys.executable))
    catmaps.chmod(0o755)
    install, *steps = blocks(TUTORIAL)
    assert "pip install" in install
    paths = [str(catmaps.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    surroundings = os.environ | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", "\n".join(steps)],
        cwd=tmp_path,
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "texts").iterdir())) == 134
    assert "<svg" in (tmp_path / "runs" / "own-map" / "report.html").read_text()
    assert (tmp_path / "flow.html").stat().st_size > 10_000
    assert done.stdout.count("s.e.") == 2
