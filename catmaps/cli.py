"""The command line: `catmaps COMMAND ...`. Results go to stdout (one JSON object with --json), the rest to stderr.

A user's error is one line on stderr and exit status 2; a training that a signal stopped has saved and exits with 130
or 143.
"""

import contextlib
import importlib
import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from catmaps.allocator import keep_freed_memory
from catmaps.errors import UserError


class Command(Protocol):
    """A dataclass of a command's arguments."""

    json: bool

    def run(self) -> dict[str, Any]:
        """Does it, printing for people (on stderr with --json), and returns what --json prints."""
        ...


@dataclass(frozen=True)
class Entry:
    """Where a command lives; modules are imported when their command is called."""

    summary: str
    module: str
    examples: tuple[str, ...]
    """What follows `catmaps ` in the examples that --help ends with; a test parses them."""


class Helped(SystemExit):
    """--help was answered, with the options of this dataclass."""

    def __init__(self, kind: type[Any]) -> None:
        super().__init__(0)
        self.kind = kind


COMMANDS = {
    "train": Entry(
        "train a base flow: catmaps train PRESET | --from RUN --out DIR [--part.field value]",
        "train",
        (
            "train small --out runs/base",
            "train small --data.shards shards --training.steps 10000 --out runs/own",
            "train small --out runs/base --tracking.to tensorboard",
            "train --resume runs/base",
            "train quickstart --from letters-base --data.shards shards --training.steps 150 --out runs/tuned",
        ),
    ),
    "distill": Entry(
        "turn a base into a flow map: catmaps distill --from RUN --out DIR",
        "train",
        ("distill --from runs/base --out runs/map", "distill --from runs/base --objective.loss ecld --out runs/ecld"),
    ),
    "sample": Entry(
        "write texts: catmaps sample RUN --steps 4 --num 8",
        "sample",
        (
            "sample",
            "sample runs/map --steps 2 --num 4 --seed 1",
            "sample runs/map --prompt 'the king of ' --tokens 64",
            "sample runs/map --infill 'the king of [[12]] was [[20]] the war'",
            "sample runs/map --num 1 --show-trajectory",
        ),
    ),
    "score": Entry(
        "bound the likelihood of text: catmaps score RUN FILE | --split test",
        "score",
        (
            "score novel.txt",
            "score runs/base novel.txt",
            "score runs/base --split test --windows 1024 --compile",
            "score runs/base - --lines --out scores.jsonl < lines.txt",
        ),
    ),
    "report": Entry(
        "one HTML page about a run: catmaps report RUN",
        "report",
        ("report runs/map", "report runs/map --num 64 --calls 1 4 --out page.html"),
    ),
    "frontier": Entry(
        "quality against diversity over temperature: catmaps frontier RUN [--base RUN]",
        "frontier",
        ("frontier runs/map --base runs/base", "frontier runs/map --temperatures 0.6 0.8 1.0 --judge smollm2"),
    ),
    "judge": Entry(
        "texts under a causal language model: catmaps judge FILE --judge NAME",
        "judge",
        (
            "judge --fetch",
            "sample runs/map --num 256 --json > own.json",
            "judge own.json --reference novel.txt",
            "judge own.json --judge gpt2-large",
        ),
    ),
    "bench": Entry(
        "speed and memory beside a dense reference: catmaps bench --suite step",
        "bench",
        ("bench --suite step", "bench --suite sample --rounds 4 --out sample.json"),
    ),
    "plan": Entry(
        "what a training costs: catmaps plan PRESET --gpus 256 --tokens 2.1T",
        "plan",
        (
            "plan 1.7b --gpus 256 --gpu h100 --tokens 2.1T",
            "plan runs/base --distill",
            "plan 1.7b --gpus 64 --simulate",
        ),
    ),
    "study": Entry(
        "a grid of small trainings, compared: catmaps study run|report FOLDER",
        "study",
        ("study run studies/clock", "study report studies/clock"),
    ),
    "info": Entry("what a run is: catmaps info RUN", "info", ("info runs/map", "info 1.7b --vocabulary 50304")),
    "data": Entry(
        "token shards from your text: catmaps data build PATH... --out DIR",
        "data",
        ("data build novels/ --out shards", "data build novels/ more.jsonl --tokenizer bpe:4096 --out shards"),
    ),
    "eval": Entry(
        "standard benchmarks by lm-eval: catmaps eval RUN --tasks piqa | --offline-tasks",
        "eval",
        ("eval runs/base --tasks piqa arc_easy", "eval runs/base --offline-tasks --limit 200"),
    ),
    "export": Entry(
        "a directory for Hugging Face: catmaps export RUN --out DIR",
        "export",
        ("export runs/map --out my-map", "export runs/map --out my-map --format run --half", "sample my-map --num 4"),
    ),
    "import": Entry(
        "a published checkpoint as a run: catmaps import SOURCE --format flm --out RUN",
        "import_",
        (
            "import david3684/FMLM-B-LM1B --format flm --out runs/fmlm",
            "import semicat/last.safetensors --format semicat --tokenizer text8 --out runs/cfm",
        ),
    ),
    "serve": Entry(
        "an HTTP server, as OpenAI's, and a page: catmaps serve RUN",
        "serve",
        ("serve runs/map", "serve runs/map --host 0.0.0.0 --port 80      # with CATMAPS_API_KEY set"),
    ),
    "show": Entry(
        "a page on which texts form, one file: catmaps show RUN --html FILE",
        "show",
        (
            "show runs/map --html flow.html --prompt 'the king of '",
            "show runs/map --html flow.html --infill 'the king of [[12]] was [[20]] the war' --steps 1 4",
        ),
    ),
    "steer": Entry(
        "write texts towards a reward: catmaps steer RUN --reward contains:WORD",
        "steer",
        (
            "steer runs/map --reward contains:castle --num 4",
            "steer runs/map --reward valid-words --strength 20 --infill 'the king of [[40]]'",
        ),
    ),
    "completion": Entry(
        "words that a shell completes: catmaps completion bash|zsh|fish",
        "completion",
        (
            "completion bash > ~/.local/share/bash-completion/completions/catmaps",
            "completion zsh > ~/.catmaps.zsh            # and `source ~/.catmaps.zsh` in ~/.zshrc",
            "completion fish > ~/.config/fish/completions/catmaps.fish",
        ),
    ),
}


def usage() -> str:
    lines = [f"  {name:<11}{entry.summary}" for name, entry in COMMANDS.items()]
    return "usage: catmaps COMMAND ...\n\n" + "\n".join(lines) + "\n\n`catmaps COMMAND --help` lists its options.\n"


def examples(name: str) -> str:
    return "\nexamples:\n" + "".join(f"  catmaps {example}\n" for example in COMMANDS[name].examples)


def parse(kind: type[Any], args: list[str], prog: str, default: Any = None) -> Any:
    """Reads a command's dataclass from arguments; a mistake becomes a one-line UserError."""
    import tyro

    options = {} if default is None else {"default": default}
    errors, out = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(out):
            return tyro.cli(kind, args=args, prog=prog, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            sys.stdout.write(out.getvalue().rstrip() + "\n" + examples(prog.split()[1]))
            raise Helped(kind) from None
        words = re.sub(r"[╭╮╰╯│─━]+|-{5,}", " ", errors.getvalue() + out.getvalue())
        line = " ".join(words.split()).split(" For full helptext")[0].rstrip(". ")
        for heading in ("Parsing error ", "Unrecognized options ", "Invalid choice "):
            line = line.removeprefix(heading)
        raise UserError(f"{line}; see `{prog} --help`") from None
    except ValueError as error:  # a dataclass refused a value
        raise UserError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    if args[0] == "--version":
        from catmaps import __version__

        sys.stdout.write(f"catmaps {__version__}\n")
        return 0
    try:
        return run(args[0], args[1:])
    except UserError as error:
        sys.stderr.write(f"catmaps: {' '.join(str(error).split())}\n")
        return 2
    except BrokenPipeError:
        # The reader (head, less) has left: nothing is wrong. Keep the interpreter's last flush from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(name: str, args: list[str]) -> int:
    if name not in COMMANDS:
        raise UserError(f"no command {name}; there are {', '.join(COMMANDS)}")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|olmo_core")
    keep_freed_memory()
    module = importlib.import_module(f"catmaps.commands.{COMMANDS[name].module}")
    read: Callable[[str, list[str]], Command] = module.read
    command = read(name, args)
    speaks = os.environ.get("RANK", "0") == "0"  # of the processes of a torchrun the first
    to = io.StringIO() if not speaks else sys.stderr if command.json else sys.stdout
    with contextlib.redirect_stdout(to):
        result = command.run()
    status = int(result.pop("exit_status", 0))
    if command.json and speaks:
        sys.stdout.write(json.dumps(_finite(result), allow_nan=False) + "\n")
    return status


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
