"""A network as numbers: what the planner knows of it, and its parameters by part."""

from dataclasses import dataclass, fields

from catmaps.config import Config

Number = float | int  # FLOPs and bytes are whole until something divides them
FEATURES = 34  # of a time: clock and log-SNR, and sines and cosines of eight frequencies of each
GAIN_WIDTH = 16  # of the two gains' inner layers
CLOCK_NODES = 8193  # of the clock's table, a buffer


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a flow's network and of what passes through it."""

    vocabulary: int
    length: int
    """Tokens of a sequence, L."""
    width: int
    """Residual width, d."""
    blocks: int
    heads: int
    conditioning: int
    mlp_ratio: int
    neighbours: int = 0
    linear: bool = False
    """Input `linear` instead of `belief`."""
    skip: bool = True
    times: int = 2
    """Distinct times in a sequence: 2 where some positions are clean, else 1."""
    fused: bool = True
    """Attention without an L x L matrix in memory; tangents always form it."""

    @classmethod
    def of(cls, config: Config, vocabulary: int, *, fused: bool = True) -> "Shape":
        """The shape of a run's network at a size of vocabulary."""
        net = config.network
        return cls(
            vocabulary=vocabulary,
            length=config.data.length,
            width=net.width,
            blocks=net.blocks,
            heads=net.heads,
            conditioning=net.conditioning,
            mlp_ratio=net.mlp_ratio,
            neighbours=net.neighbours,
            linear=net.input == "linear",
            skip=net.skip,
            times=2 if config.objective.clean else 1,
            fused=fused,
        )

    @property
    def projects(self) -> bool:
        """Whether noise is drawn in the d dimensions that the input sees, and x is never made."""
        return self.linear and not self.skip and self.vocabulary > self.width


@dataclass(frozen=True)
class Parameters:
    """Numbers of trainable parameters by part."""

    embedding: int
    head: int
    attention: int
    mlp: int
    modulation: int
    """Of the blocks and of the final norm."""
    time: int
    """Conditioning and gains."""
    neighbours: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def body(self) -> int:
        """Outside the two vocabulary tables."""
        return self.total - self.embedding - self.head


def _taps(shape: Shape) -> int:
    return 2 * shape.neighbours + 1 if shape.neighbours else 0


def parameters(shape: Shape) -> Parameters:
    """Parameters of a `FlowNetwork` of this shape, exactly."""
    d, c, n = shape.width, shape.conditioning, shape.blocks
    start, gap = FEATURES * c + c + c * c + c, FEATURES * c + c * c
    gain = 2 * GAIN_WIDTH + GAIN_WIDTH + GAIN_WIDTH + 2
    return Parameters(
        embedding=shape.vocabulary * d,
        head=shape.vocabulary * d,
        attention=n * (4 * d * d + 2 * (d // shape.heads)),
        mlp=n * 2 * shape.mlp_ratio * d * d,
        modulation=n * (c + 1) * 6 * d + (c + 1) * 2 * d,
        time=start + gap + 2 * gain,
        neighbours=n * 2 * _taps(shape) * d,
    )


def block_parameters(shape: Shape) -> int:
    """Of one block: what is gathered for its call. All else is gathered at once: the tables, time, the final norm."""
    d, c = shape.width, shape.conditioning
    near = 2 * _taps(shape) * d
    return (4 + 2 * shape.mlp_ratio) * d * d + 2 * (d // shape.heads) + (c + 1) * 6 * d + near


def parameter_tensors(shape: Shape) -> int:
    """How many tensors the parameters are: AdamW keeps a step counter for each."""
    return (10 if shape.neighbours else 8) * shape.blocks + 2 + 6 + 2 * 4 + 2


def block_matrices(shape: Shape) -> int:
    """Parameters that Muon takes: the four projections of every block."""
    return shape.blocks * (4 + 2 * shape.mlp_ratio) * shape.width**2


def low_precision_copies(shape: Shape) -> int:
    """Parameters that autocast copies to bf16 for a pass: linear layers outside the gains, and q/k norms."""
    return parameters(shape).total - 2 * (2 * GAIN_WIDTH + 2 * GAIN_WIDTH + 2)


def exported_bytes(shape: Shape) -> int:
    """model.safetensors: fp32 parameters, log prior, clock and frequencies; without its short header."""
    return 4 * (parameters(shape).total + shape.vocabulary + 2 * CLOCK_NODES + 8)
