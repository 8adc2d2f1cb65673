"""The configuration of a run: frozen dataclasses, one JSON file in the run's folder, nothing else.

On the command line every field is `--part.field value`. Named configurations are functions in `presets.py`.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from catmaps.errors import UserError
from catmaps.flow.objective import ObjectiveConfig
from catmaps.network.denoiser import NetworkConfig
from catmaps.network.published import PublishedConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read."""

    shards: str | None = None
    """Directory of token shards (`catmaps data build`), or the URL of one (s3://, gs://, https://); None: the embedded
    public-domain corpus."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Directories of token shards with their weights, in place of `shards`: web 0.7 books 0.3."""
    tokenizer: str = "text8"
    """Of the embedded corpus: text8 (27 symbols), bytes, bpe:4096, or a tokenizer.json. Own shards bring theirs."""
    length: int = 128
    """Tokens per sequence."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"data.length must be at least 1, not {self.length}")
        if self.mixture and self.shards is not None:
            raise ValueError("data.shards and data.mixture exclude each other: give one of them")
        for place, weight in self.mixture.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"data.mixture: the weight of {place} must be positive, not {weight}")


@dataclass(frozen=True, kw_only=True)
class ClockConfig:
    """The law of time."""

    law: Literal["warp", "uniform", "logit_normal", "decoding_error"] = "warp"
    """0.9 decoding-error warp + 0.1 uniform; uniform; logit-normal(-0.4, 1); the decoding-error warp alone."""
    adaptive: bool = True
    """Move to the information-uniform law as its histogram fills."""


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW, or Muon for the blocks' matrices and AdamW for the rest; warm-up, stable, linear decay to zero."""

    name: Literal["adamw", "muon"] = "muon"
    lr: float = 3e-3
    """AdamW's learning rate."""
    muon_lr: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: float = 0.4
    """Share of the steps, at the end, over which the rate falls linearly to zero."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.995
    """Decay of the weights' moving average, which is what is saved, sampled and scored."""
    spike: float = 0.0
    """Steps are skipped whose gradient's norm lies so many standard deviations above the mean of the last 128; 0: only
    those whose gradient is not finite."""
    patience: int = 10
    """Skipped steps in a row after which the run ends."""

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.muon_lr > 0 and self.clip > 0):
            raise ValueError("optimiser.lr, optimiser.muon_lr and optimiser.clip must be positive")
        if not 0 <= self.decay <= 1 or self.warmup < 0 or self.weight_decay < 0:
            raise ValueError("optimiser: decay must lie in [0, 1], warmup and weight_decay must not be negative")
        if self.spike < 0 or self.patience < 1:
            raise ValueError("optimiser.spike must not be negative and optimiser.patience at least 1")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimiser.{name} must lie in [0, 1), not {getattr(self, name)}")


NUMBERS_PER_MEGABYTE = 2**18


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long and how."""

    steps: int = 1000
    batch: int = 64
    """Sequences per step, over all processes."""
    micro_batch: int = 64
    """Sequences per forward and backward pass of one process."""
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of matrix products; weights, softmax and losses are fp32."""
    compile: bool = True
    """Compile the blocks (about half a minute at the start)."""
    tile_megabytes: int = 25
    """Of the largest tensor in a tile of vocabulary-sized work; a few live at a time. From 32 on memory is slower to
    get on CPUs (`catmaps.allocator`)."""
    threads: int | None = None
    """CPU threads of a process; None: torch's choice."""
    save_every: int = 500
    keep: int = 2
    """Checkpoints that are kept, the latest ones."""
    keep_every: int = 0
    """Checkpoints of steps divisible by this are kept for good; 0: none."""
    log_every: int = 10
    evaluate_every: int = 500
    """Steps between two likelihood bounds on the validation split; 0: never."""
    evaluate_sequences: int = 128

    def tile_numbers(self, projects: bool) -> int:
        """Positions x vocabulary of a tile. Its tensors are in fp32 where x is made, else at most in bf16."""
        return self.tile_megabytes * NUMBERS_PER_MEGABYTE * (2 if projects else 1)

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "micro_batch",
            "save_every",
            "keep",
            "log_every",
            "evaluate_sequences",
            "tile_megabytes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, not {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"training.threads must be at least 1, not {self.threads}")
        for name in ("seed", "evaluate_every", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name} must not be negative, as {getattr(self, name)} is")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How processes share the work (docs/scale.md). They always divide the batch."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: each process holds the whole network; fsdp: all share one copy of weights, gradients, optimiser and average;
    hsdp: groups of `shard_degree` share one."""
    shard_degree: int | None = None
    """Processes of a group of hsdp; None: those of a machine."""
    checkpoint_activations: bool = False
    """Blocks are done again in the backward pass: less memory, a third more time."""
    timeout: int = 600
    """Seconds that a process waits for another before the run ends, to be started again."""

    def __post_init__(self) -> None:
        if self.shard_degree is not None and self.shard_degree < 1:
            raise ValueError(f"parallel.shard_degree must be at least 1, not {self.shard_degree}")
        if self.shard_degree is not None and self.strategy != "hsdp":
            raise ValueError("parallel.shard_degree is for parallel.strategy hsdp")
        if self.timeout < 1:
            raise ValueError(f"parallel.timeout must be at least 1, not {self.timeout}")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics.jsonl is repeated (docs/tracking.md)."""

    to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """TensorBoard, Weights & Biases or Trackio; each is a package: pip install 'catmaps[track]'."""
    project: str = "catmaps"
    """Of wandb and trackio."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All of a run."""

    preset: Annotated[str, tyro.conf.Suppress] = ""
    base: Annotated[str | None, tyro.conf.Suppress] = None
    """The run it was distilled from, if it was."""
    start: Annotated[str | None, tyro.conf.Suppress] = None
    """The run whose weights it began with; None: with a base's, or random ones."""
    family: Literal["flow", "autoregressive", "masked", "uniform"] = "flow"
    """The flow, or a baseline on the same trunk, to which clock, objective, network.input and network.skip are idle."""
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    clock: ClockConfig = field(default_factory=ClockConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    published: Annotated[PublishedConfig | None, tyro.conf.Suppress] = None
    """Whose architecture the network has, if it was imported."""

    def __post_init__(self) -> None:
        if self.family != "flow" and (self.base is not None or self.objective.off_diagonal > 0):
            raise ValueError(f"family {self.family} has no flow map: leave out base and objective.off_diagonal")
        if self.base is not None and self.start is not None:
            raise ValueError("a distilled map begins with its base's weights: leave out start")
        if self.average_teaches and self.base is None and self.network.input == "linear":
            raise ValueError(
                "objective.jumps average without a base needs network.input belief: noise is drawn as the map's own "
                "input table sees it, and the average's is another"
            )

    @property
    def average_teaches(self) -> bool:
        """Whether the moving average is called for targets: psd's jumps and, without a frozen base, its diagonal."""
        objective = self.objective
        called = objective.loss == "psd" or self.base is None
        return objective.jumps == "average" and objective.off_diagonal > 0 and called


T = TypeVar("T")
ADDED: dict[str, Any] = {
    "data.mixture": {},
    "family": "flow",
    "start": None,
    "objective.final": 0.0,
    "objective.ladder": 0.0,
    "objective.weighting": "unit",
    "objective.jumps": "map",
    "training.tile_megabytes": 31,
    "network.neighbours": 0,
    "published": None,
    "optimiser.spike": 0.0,
    "optimiser.patience": 10,
    "training.keep": 2,
    "training.keep_every": 0,
    "parallel": {},
    "parallel.strategy": "ddp",
    "parallel.shard_degree": None,
    "parallel.checkpoint_activations": False,
    "parallel.timeout": 600,
    "tracking": {},
    "tracking.to": "none",
    "tracking.project": "catmaps",
}
"""Fields that files of earlier versions lack, with what those runs were."""


def to_json(config: Config) -> str:
    return json.dumps(asdict(config), indent=2) + "\n"


HUB_TYPE = "catmaps"
"""The `model_type` of an exported directory's config.json, which holds the run's configuration as `run`."""


def is_exported(values: Any) -> bool:
    """Whether a config.json is that of an exported directory rather than of a run's folder."""
    return isinstance(values, dict) and values.get("model_type") == HUB_TYPE


def flat(config: Config) -> dict[str, Any]:
    """Every field by its name on the command line, as network.width."""
    parts = asdict(config)
    named = [
        (f"{part}.{name}", value) for part, of in parts.items() if isinstance(of, dict) for name, value in of.items()
    ]
    return {part: value for part, value in parts.items() if not isinstance(value, dict)} | dict(named)


def from_json(text: str, where: str) -> Config:
    """Reads a configuration back, a run's or an exported one's, strictly: unknown and missing fields are named.

    Raises:
        UserError: Not JSON, or fields that this version does not know; `where` is the file's name.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not a configuration of this version of catmaps: {error}") from error
    return config_from(values.get("run") if is_exported(values) else values, where)


def config_from(values: Any, where: str) -> Config:
    """`from_json` of what stood in the file."""
    try:
        return _build(Config, values, "")
    except ValueError as error:
        raise UserError(f"{where} is not a configuration of this version of catmaps: {error}") from error


def _build(kind: type[T], values: Any, prefix: str) -> T:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the file'} is not an object")
    types = get_type_hints(kind)
    names = {f.name for f in fields(kind)}  # pyright: ignore[reportArgumentType]
    values = {name: ADDED[prefix + name] for name in names if prefix + name in ADDED} | values
    for what, odd in (("unknown", set(values) - names), ("missing", names - set(values))):
        if odd:
            raise ValueError(f"{what} field {prefix}{min(odd)}")
    return kind(**{name: _value(types[name], value, prefix + name) for name, value in values.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    if (nested := _nested(kind, value)) is not None:
        return _build(nested, value, f"{name}.")
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {value!r}")
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, not {value!r}")
        return {key: _value(get_args(kind)[1], item, f"{name}.{key}") for key, item in value.items()}
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be of type {getattr(kind, '__name__', kind)}, not {value!r}")
    return float(value) if kind is float else value


def _nested(kind: Any, value: Any) -> Any:
    """The dataclass that a value should be: `kind` itself, or the one of "a dataclass or None" unless it is None."""
    found = next((part for part in (kind, *get_args(kind)) if is_dataclass(part)), None)
    return found if found is kind or value is not None else None
