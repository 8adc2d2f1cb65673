"""Named configurations: one function each. A variant calls another and changes a field."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from catmaps.config import Config, DataConfig, OptimiserConfig, ParallelConfig, TrainingConfig, flat
from catmaps.errors import UserError
from catmaps.flow.objective import ObjectiveConfig
from catmaps.model import read_config
from catmaps.network.denoiser import NetworkConfig


def tiny() -> Config:
    """A smoke test: seconds on one core."""
    return Config(
        network=NetworkConfig(width=64, blocks=2, heads=2),
        data=DataConfig(length=64),
        optimiser=OptimiserConfig(warmup=20, ema=0.98),
        training=TrainingConfig(
            steps=200, batch=32, micro_batch=32, save_every=100, evaluate_every=100, evaluate_sequences=64
        ),
    )


def small() -> Config:
    """27 symbols, 4.5M parameters, 28M characters: about an hour on 2 cores, to 2.24 bits per character."""
    return Config(
        network=NetworkConfig(neighbours=3),
        optimiser=OptimiserConfig(warmup=60, ema=0.998),
        training=TrainingConfig(steps=3400, batch=64, micro_batch=32, save_every=250),
    )


def quickstart() -> Config:
    """`small`, shorter: about ten minutes on 2 cores."""
    base = small()
    training = replace(base.training, steps=1000, batch=32, save_every=500)
    return replace(base, optimiser=replace(base.optimiser, ema=0.99), training=training)


def words() -> Config:
    """`small` on a BPE of 4,096, 6.6M parameters: windows of about 500 characters."""
    base = small()
    training = replace(base.training, steps=4000, batch=32, micro_batch=16, evaluate_sequences=32)
    return replace(base, data=DataConfig(tokenizer="bpe:4096", length=128), training=training)


def _scaled(width: int, blocks: int, heads: int, batch: int, steps: int, lr: float) -> Config:
    """Subword text at length 1,024. The processes of a machine share a copy, machines have one each."""
    return Config(
        data=DataConfig(tokenizer="bpe:4096", length=1024),
        network=NetworkConfig(width=width, blocks=blocks, heads=heads),
        optimiser=OptimiserConfig(name="adamw", lr=lr, beta2=0.95, warmup=2000, decay=0.2, ema=0.9999, spike=6.0),
        training=TrainingConfig(
            steps=steps, batch=batch, micro_batch=8, save_every=1000, keep_every=20_000, evaluate_every=5000
        ),
        parallel=ParallelConfig(strategy="hsdp"),
    )


def p130m() -> Config:
    """130M parameters (V = 50k), 100B tokens."""
    return _scaled(width=768, blocks=7, heads=12, batch=512, steps=190_000, lr=6e-4)


def p400m() -> Config:
    """400M parameters (V = 50k), 300B tokens."""
    return _scaled(width=1024, blocks=23, heads=16, batch=1024, steps=286_000, lr=4e-4)


def p1700m() -> Config:
    """1.7B parameters at V = 50,304, 2.1T tokens: the size and budget of arXiv:2605.07820."""
    return _scaled(width=2048, blocks=29, heads=16, batch=4096, steps=500_000, lr=2e-4)


def _distilled(base: Config, steps: int) -> Config:
    """The second stage: half of each batch holds the diagonal to the frozen base, half teaches the jumps."""
    return replace(
        base,
        objective=ObjectiveConfig(off_diagonal=0.5, boundary=0.3, final=0.5, ladder=0.5),
        optimiser=replace(base.optimiser, lr=4e-4, muon_lr=0.002, warmup=50, decay=0.7, ema=0.995),
        training=replace(base.training, steps=steps),
    )


def distill(base: Config) -> Config:
    """Distils the base of a run: about 25 minutes on 2 cores for `small`."""
    return _distilled(base, steps=700)


def distill_quickstart(base: Config) -> Config:
    """`distill`, shorter: about five minutes on 2 cores."""
    return _distilled(base, steps=250)


PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": tiny,
    "small": small,
    "quickstart": quickstart,
    "words": words,
    "130m": p130m,
    "400m": p400m,
    "1.7b": p1700m,
}
DISTILLATIONS: dict[str, Callable[[Config], Config]] = {
    "distill": distill,
    "quickstart": distill_quickstart,
}


def distilled(source: str, preset: str) -> Config:
    """The configuration that distils a run by a preset.

    Raises:
        UserError: No such preset or run, or a run that cannot be distilled.
    """
    if preset not in DISTILLATIONS:
        raise UserError(f"no distillation preset {preset}; there are {', '.join(DISTILLATIONS)}")
    base = read_config(Path(source))
    if base.family != "flow":
        raise UserError(f"run {source} is of family {base.family}: only a flow can be distilled into a map")
    return replace(DISTILLATIONS[preset](base), base=source, start=None, preset=preset)


def continued(source: str, preset: str | None = None) -> Config:
    """The configuration that trains on from a run's weights.

    Args:
        source: The run: a base, or a baseline.
        preset: Whose objective, optimiser and training it has; None: the run's own.

    Raises:
        UserError: No such preset or run, or a run that cannot be trained on.
    """
    run = read_config(Path(source))
    if run.published is not None:
        raise UserError(f"run {source} was imported: its network is sampled and scored, but not trained")
    if run.base is not None or run.objective.off_diagonal > 0:
        instead = f"--resume {source}" if run.base is None else f"begin with the base it comes from, --from {run.base}"
        raise UserError(f"run {source} is a flow map, and a base begins with a base's weights: {instead}")
    if preset is not None:
        own = replace(preset_of(preset), family=run.family, data=run.data, network=run.network, clock=run.clock)
        return replace(own, start=source)
    return replace(run, start=source)


def preset_of(name: str) -> Config:
    """A preset's configuration, by its name; UserError if there is none."""
    if name not in PRESETS:
        raise UserError(f"no preset {name}; there are {', '.join(PRESETS)}")
    return replace(PRESETS[name](), preset=name)


def agree(config: Config, source: Config, name: str) -> None:
    """Whether a run can have the weights of another, `name`: they have one network, and one alphabet.

    Raises:
        UserError: Names the first field in which they differ, with both values.
    """
    own, others = flat(config), flat(source)
    for field, value in others.items():
        kept = field in ("family", "data.tokenizer") or field.startswith("network.")
        if kept and own[field] != value:
            raise UserError(f"{field} is {value} in {name}, whose weights are taken, and cannot be {own[field]}")
