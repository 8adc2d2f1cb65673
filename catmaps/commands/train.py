"""`catmaps train` and `catmaps distill`: the same code."""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from catmaps.cli import parse
from catmaps.config import Config, DataConfig
from catmaps.errors import UserError
from catmaps.model import CONFIG, read_config
from catmaps.models import located
from catmaps.presets import DISTILLATIONS, PRESETS, agree, continued, distilled, preset_of


@dataclass(frozen=True)
class Train:
    """Train a run's folder. Every field of the configuration is an option; --resume takes none.

    --from RUN begins with the weights of another base, or of a model of the package, and is trained as that one was
    unless options or a preset say otherwise; network and tokenizer stay.
    """

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=Config)
    out: Path | None = None
    """Folder of the new run; by default runs/PRESET, with --from RUN runs/RUN-more."""
    restart: bool = False
    """Go on with the run in --out if it was begun with these options: for schedulers that start a job again. After
    torchrun's own restarts that is done anyhow."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""


@dataclass(frozen=True)
class Moved:
    """Where the data of a run lie now."""

    shards: str | None = None
    """Directory or URL of the run's token shards, if they were moved; the run remembers it."""
    mixture: dict[str, float] = field(default_factory=dict)
    """The same for a mixture: its directories in their order, with their weights."""


@dataclass(frozen=True)
class Resume:
    """Continue a run from its last checkpoint."""

    resume: Path
    """Folder of the run."""
    steps: int | None = None
    """Another number of steps in all than the run began with; the rate's decay moves with it."""
    data: Moved = field(default_factory=Moved)
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from catmaps.training.train import with_steps

        if not (self.resume / CONFIG).is_file() and located(self.resume) != self.resume:
            raise UserError(
                f"{self.resume} comes with the package and has no checkpoints; a base is begun with: --from RUN"
            )
        config = read_config(self.resume)
        if self.steps is not None:
            config = with_steps(config, self.resume, self.steps)
        if self.data == Moved():
            return _train(self.resume, config)
        try:
            data = replace(config.data, shards=self.data.shards, mixture=self.data.mixture)
        except ValueError as error:
            raise UserError(str(error)) from error
        return _train(self.resume, replace(config, data=data), data)


@dataclass(frozen=True)
class Start:
    """A new run, ready to begin."""

    config: Config
    out: Path
    json: bool
    restart: bool = False

    def run(self) -> dict[str, Any]:
        from catmaps.training.train import restart, start

        again = self.restart or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if int(os.environ.get("RANK", "0")) == 0:
            (restart if again else start)(self.config, self.out)
        else:
            _wait_for(self.out)
        return _train(self.out, self.config)


def read(name: str, args: list[str]) -> Resume | Start:
    """Parses either command; the preset, or the base's configuration, supplies the defaults."""
    prog = f"catmaps {name}"
    if any(arg == "--resume" or arg.startswith("--resume=") for arg in args):
        return parse(Resume, args, prog)
    if name == "train":
        return _read_train(args, prog)
    return _read_distill(args, prog)


def _read_train(args: list[str], prog: str) -> Start:
    if args and args[0] in ("-h", "--help"):
        args = ["small", "--help"]
    source, args = _take(args, "--from")
    preset, rest = (None, args) if not args or args[0].startswith("-") else (args[0], args[1:])
    if source is not None:
        return _read_continued(source, preset, rest, prog)
    if preset is None:
        raise UserError(f"which preset? `{prog} PRESET`, with one of {', '.join(PRESETS)}; or `{prog} --from RUN`")
    command: Train = parse(Train, rest, f"{prog} {preset}", Train(config=preset_of(preset)))
    return Start(command.config, command.out or Path("runs") / preset, command.json, command.restart)


def _read_continued(source: str, preset: str | None, rest: list[str], prog: str) -> Start:
    config = continued(source, preset)
    default = Train(config=_without_data(config, rest))
    command: Train = parse(Train, rest, f"{prog} --from {source}", default)
    agree(command.config, config, source)
    out = command.out or Path("runs") / f"{located(Path(source)).resolve().name}-more"
    return Start(command.config, out, command.json, command.restart)


def _without_data(config: Config, args: list[str]) -> Config:
    """A source's configuration; without the place of its data where the arguments name one."""
    if any(arg.partition("=")[0] in ("--data.shards", "--data.mixture") for arg in args):
        return replace(config, data=replace(config.data, shards=None, mixture={}))
    return config


def _read_distill(args: list[str], prog: str) -> Start:
    source, rest = _take(args, "--from")
    preset, rest = _take(rest, "--preset")
    if source is None:
        if any(arg in ("-h", "--help") for arg in args):
            sys.stdout.write(f"usage: {prog} --from RUN [--preset {'|'.join(DISTILLATIONS)}] [options]\n\n")
            default = Train(config=DISTILLATIONS["distill"](Config()))
            return parse(Train, ["--help"], f"{prog} --from RUN", default)
        raise UserError(f"which base? `{prog} --from RUN`")
    config = distilled(source, preset or "distill")
    command: Train = parse(Train, rest, f"{prog} --from {source}", Train(config=_without_data(config, rest)))
    agree(command.config, config, source)
    default_out = Path(source).with_name(Path(source).name + "-map")
    return Start(command.config, command.out or default_out, command.json, command.restart)


def _take(args: list[str], option: str) -> tuple[str | None, list[str]]:
    """Takes `option VALUE` or `option=VALUE` out of the arguments."""
    for i, arg in enumerate(args):
        if arg == option:
            if i + 1 == len(args):
                raise UserError(f"{option} needs a value")
            return args[i + 1], args[:i] + args[i + 2 :]
        if arg.startswith(option + "="):
            return arg.removeprefix(option + "="), args[:i] + args[i + 1 :]
    return None, args


def _wait_for(folder: Path) -> None:
    """Other processes of a torchrun wait until the first has made the folder."""
    import time

    for _ in range(600):
        if (folder / "config.json").exists():
            return
        time.sleep(0.5)
    raise UserError(f"process 0 made no {folder} within five minutes")


def _train(folder: Path, config: Config, data: DataConfig | None = None) -> dict[str, Any]:
    from catmaps.training.train import train

    outcome = train(folder, data=data)
    kind = config.family if config.family != "flow" else "map" if config.objective.off_diagonal else "base"
    if outcome.complete:
        print(f"{kind} trained: {folder} ({outcome.step} steps). Next: catmaps sample {folder}")
    else:
        print(f"stopped at step {outcome.step} of {outcome.steps}, saved. Continue: catmaps train --resume {folder}")
    status = 0 if outcome.complete else 143 if "SIGTERM" in (outcome.stopped_by or "") else 130
    return {
        "run": str(folder),
        "step": outcome.step,
        "steps": outcome.steps,
        "complete": outcome.complete,
        "exit_status": status,
    }
