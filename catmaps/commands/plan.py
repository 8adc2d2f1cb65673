"""`catmaps plan`."""

import re
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from catmaps.cli import parse
from catmaps.config import Config
from catmaps.errors import UserError
from catmaps.models import located, names
from catmaps.presets import DISTILLATIONS, PRESETS

if TYPE_CHECKING:
    from catmaps.training.planner import Plan

NOMINAL = 50_304  # the vocabulary that the large presets are named for
LETTERS = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Options:
    """What a training costs before anyone pays for it. Every field of the configuration is an option."""

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=Config)
    gpus: int = 1
    """Devices."""
    gpu: str = "h100"
    """Kind of device: a100, h100, h200, b200, or cpu (one core)."""
    tokens: str | None = None
    """To train on, as 2.1T, 300B or 5M; default: the steps of the configuration."""
    mfu: float = 0.4
    """Share of the peak FLOP/s that all matrix products reach."""
    shard: int | None = None
    """Devices that share a copy of weights, gradients, optimiser and average; default: all; 1: replicas."""
    checkpointing: bool = False
    """Activation checkpointing: blocks are done again in the backward pass."""
    vocabulary: int | None = None
    """Size of the vocabulary; default: the tokenizer's, and 50,304 for the large presets."""
    simulate: bool = False
    """Build the trainer and make a step as one of these devices, on a process group without others: checks shards and
    collectives against the plan. Takes the memory of one device's share, and minutes for the large presets."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""


@dataclass(frozen=True)
class PlanCommand:
    """A plan, ready to be made."""

    name: str
    options: Options
    vocabulary: int
    json: bool

    def run(self) -> dict[str, Any]:
        from catmaps.commands.plan_table import as_dict, show
        from catmaps.training.planner import HARDWARE, Cluster, advice, plan

        options = self.options
        if options.gpu not in HARDWARE:
            raise UserError(f"no device {options.gpu} is known; there are {', '.join(HARDWARE)}")
        cluster = Cluster(
            gpus=options.gpus,
            hardware=HARDWARE[options.gpu],
            shard=options.shard,
            mfu=options.mfu,
            checkpointing=options.checkpointing or options.config.parallel.checkpoint_activations,
        )
        tokens = None if options.tokens is None else quantity(options.tokens, "--tokens")
        made = plan(options.config, self.vocabulary, cluster, tokens)
        mend = () if made.fits else advice(made, self.vocabulary)
        show(self.name, made, mend)
        result = {"name": self.name, **as_dict(made, mend)}
        return {**result, "simulation": self._simulated(made)} if options.simulate else result

    def _simulated(self, made: "Plan") -> dict[str, Any]:
        from catmaps.commands.plan_table import show_simulation
        from catmaps.training.simulation import compare, simulate

        done = simulate(self.options.config, self.vocabulary, made.cluster.gpus, made.shard)
        rows = compare(done, made)
        show_simulation(done, rows)
        agrees = all(row.agrees for row in rows)
        return {**asdict(done), "agrees": agrees, "compared": [asdict(row) | {"agrees": row.agrees} for row in rows]}


def quantity(text: str, option: str) -> float:
    """A number with K, M, B (or G) or T."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMBGT]?)", text.strip().replace(",", "").replace("_", ""), re.I)
    if found is None or float(found[1]) == 0:
        raise UserError(f"{option} {text!r} is not a positive number such as 2.1T, 300B or 5M")
    return float(found[1]) * LETTERS.get(found[2].upper(), 1.0)


def read(name: str, args: list[str]) -> PlanCommand:
    prog = f"catmaps {name}"
    if args and args[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: {prog} PRESET|RUN [--distill] [options]\n\n")
        args = ["small", "--help"]
    if not args or args[0].startswith("-"):
        raise UserError(f"which preset or run? `{prog} PRESET`, with one of {', '.join(PRESETS)}, or a run's folder")
    source, rest = args[0], args[1:]
    distill = "--distill" in rest
    rest = [arg for arg in rest if arg != "--distill"]
    config, what, folder = _source(source)
    if distill and config.base is None:
        if config.family != "flow":
            raise UserError(f"{what} is of family {config.family}: only a flow can be distilled into a map")
        config, what = replace(DISTILLATIONS["distill"](config), base=source, start=None), f"{what}, distilled"
    options: Options = parse(Options, rest, f"{prog} {source}", Options(config=config))
    return PlanCommand(what, options, _vocabulary(folder, config, options), options.json)


def _source(source: str) -> tuple[Config, str, Path | None]:
    """Its configuration, its name for the reader, and its folder if it is a run."""
    if source in PRESETS and not (Path(source) / "config.json").is_file():
        return replace(PRESETS[source](), preset=source), f"preset {source}", None
    folder = located(Path(source))
    if not folder.exists():
        raise UserError(f"no preset or run {source}; presets are {', '.join(PRESETS)}; models {', '.join(names())}")
    from catmaps.model import read_config

    return read_config(folder), f"run {source}", folder


def _vocabulary(run: Path | None, default: Config, options: Options) -> int:
    data = options.config.data
    if options.vocabulary is not None:
        if options.vocabulary < 2:
            raise UserError(f"--vocabulary must be at least 2, not {options.vocabulary}")
        return options.vocabulary
    if run is not None:
        from catmaps.text.tokenizers import load

        return load(run).vocab_size
    if data.shards is not None or data.mixture:
        from catmaps.training.sources import find_sources

        return find_sources(options.config)[0].manifest.vocab_size
    if data.tokenizer == default.data.tokenizer and data.tokenizer.startswith("bpe:"):
        return NOMINAL  # a large preset: its own tokenizer is only what the embedded corpus can feed
    if data.tokenizer.startswith("bpe:") and data.tokenizer[4:].isdecimal():
        return int(data.tokenizer[4:])
    from catmaps.text.tokenizers import from_spec

    return from_spec(data.tokenizer).vocab_size
