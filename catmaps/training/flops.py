"""Matrix-product FLOPs of a training step, per token and by part. Elementwise work is listed apart, not counted.

A product (m, k) x (k, n) is 2 m k n. Each loss makes the network calls that `flow/losses.py` makes. `encode` is
embedding and trunk; `read` is the head. Vocabulary-wide work in tiles makes an endpoint that a state is built of again
where it is read, at one more head.
"""

from dataclasses import astuple, dataclass, fields

from catmaps.flow.objective import ObjectiveConfig
from catmaps.network.embedding import gram_strips
from catmaps.training.shapes import FEATURES, GAIN_WIDTH, Number, Shape

NEWTON_SCHULZ_STEPS = 5  # of torch.optim.Muon


@dataclass(frozen=True)
class Work:
    """FLOPs per token by part of the network."""

    linears: Number = 0
    """The blocks' projections."""
    attention: Number = 0
    modulation: Number = 0
    """Adaptive modulation, the time's conditioning, gains."""
    embedding: Number = 0
    head: Number = 0
    noise: Number = 0
    """Noise projected to d dimensions, of `linear` inputs without skip; other noise is elementwise."""

    @property
    def total(self) -> Number:
        return sum(astuple(self))

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: Number) -> "Work":
        return Work(*(factor * a for a in astuple(self)))


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Network calls of a loss; each also reads its endpoint once."""

    plain: int = 0
    """With gradient."""
    tangent: int = 0
    """With tangent, and gradient through it."""
    own: int = 0
    """Of the network in training, without gradient."""
    own_tangent: int = 0
    teacher: int = 0
    again: int = 0
    """Reads that tiles add; the teacher's, where there are calls of it, else the network's own."""
    still: int = 0
    """Plain reads of a tangent call's hidden vectors."""
    mixed: int = 0
    """Calls whose state holds an endpoint, which `linear` inputs without skip must project."""


def calls(role: str, teacher: bool, *, tiled: bool, skip: bool) -> Calls:
    """What `role` costs: diagonal, anchor, or the name of an off-diagonal loss."""
    t = int(tiled)
    if role == "diagonal":
        return Calls(plain=1, teacher=int(teacher))
    if role == "psd":
        return Calls(plain=1, own=2, again=t, mixed=1)
    if role == "anchor":
        return Calls(plain=1, teacher=2, again=t, mixed=1)
    if role == "esd":
        return Calls(plain=1, own_tangent=1, teacher=1, again=t, mixed=1)
    if role == "lsd_kl":
        return Calls(plain=1, own_tangent=1, teacher=1, still=1, again=t, mixed=1)
    assert role in ("lsd", "ecld")
    return Calls(tangent=1, teacher=1, still=1 + t * int(skip), mixed=1)


def trunk(shape: Shape, tangent: bool = False) -> Work:
    """The blocks' forward pass. Tangents double linear layers (one product on the pair) and triple attention."""
    d, pair = shape.width, 1 + tangent
    return Work(
        linears=pair * shape.blocks * 2 * (4 + 2 * shape.mlp_ratio) * d * d,
        attention=(3 if tangent else 1) * shape.blocks * 4 * shape.length * d,
        modulation=pair * shape.blocks * 2 * shape.conditioning * 6 * d * shape.times / shape.length,
    )


def _embedding(shape: Shape, tangent: bool) -> Work:
    d, v = shape.width, shape.vocabulary
    if shape.projects:  # what endpoints add is in `mixed`, the Gram matrix in `gram`
        return Work(noise=2 * d * d)
    return Work(embedding=2 * v * d * (1 if shape.linear else 1 + tangent))


def _ends(shape: Shape, pair: int) -> Work:
    """The final norm's modulation and the conditioning of a time."""
    c, rows = shape.conditioning, shape.times / shape.length
    return Work(modulation=pair * rows * (2 * c * 2 * shape.width + 2 * (2 * FEATURES * c + 2 * c * c)))


def _gain(shape: Shape, pair: int) -> Work:
    return Work(modulation=pair * 2 * (2 + 1) * GAIN_WIDTH * _gain_rows(shape))


def _gain_rows(shape: Shape) -> Number:
    return 1.0 if shape.times > 1 else 1 / shape.length


def encode(shape: Shape, tangent: bool = False) -> Work:
    pair = 1 + tangent
    return trunk(shape, tangent) + _embedding(shape, tangent) + _ends(shape, pair) + _gain(shape, pair)


def read(shape: Shape, tangent: bool = False) -> Work:
    pair = 1 + tangent
    gain = _gain(shape, pair) if shape.skip else Work()
    return Work(head=pair * 2 * shape.vocabulary * shape.width) + gain


def backward(shape: Shape, tangent: bool = False) -> Work:
    """Of an encode and a read: twice the forward pass, less what needs no gradient of its input.

    Fused attention multiplies its scores again, 2.5 times the forward pass.
    """
    pair, c = 1 + tangent, shape.conditioning
    forward = encode(shape, tangent) + read(shape, tangent)
    inner = pair * 2 * 2 * GAIN_WIDTH * _gain_rows(shape)  # a layer on times: only its weight has a gradient
    outer = pair * 2 * GAIN_WIDTH * _gain_rows(shape)
    unused = 2 * (inner + outer) if shape.linear else inner
    less = pair * (shape.times / shape.length) * 2 * (2 * FEATURES * c) + unused + (inner if shape.skip else 0)
    return Work(
        linears=2 * forward.linears,
        attention=(2.5 if shape.fused and not tangent else 2) * forward.attention,
        modulation=2 * forward.modulation - less,
        embedding=(1 if shape.linear else 2) * forward.embedding,
        head=2 * forward.head,
        noise=forward.noise,
    )


@dataclass(frozen=True)
class RoleWork:
    """What a token of a role costs."""

    role: str
    share: Number
    """Of all sequences."""
    calls: Calls
    gradient: Work
    """Passes with gradient, forward and backward."""
    targets: Work
    """The network's own passes without gradient, tangents apart."""
    tangents: Work
    """Passes with tangent, with gradient or without."""
    teacher: Work
    recomputed: Work
    """Done again in the backward pass: blocks under activation checkpointing. Beliefs in tiles are, but no product."""

    @property
    def total(self) -> Work:
        return self.gradient + self.targets + self.tangents + self.teacher + self.recomputed


def role_work(shape: Shape, role: str, share: Number, made: Calls, *, checkpointing: bool = False) -> RoleWork:
    mixed = Work(embedding=2 * shape.vocabulary * shape.width * made.mixed) if shape.projects else Work()
    again = read(shape) * made.again
    whole, whole_tangent = encode(shape) + read(shape), encode(shape, True) + read(shape, True)
    if shape.linear and not shape.projects and made.own_tangent:  # dx is projected as well as x
        whole_tangent = whole_tangent + _embedding(shape, False)
    by_teacher = made.teacher > 0 and role != "psd"
    none = Work()
    trunks = trunk(shape) * made.plain + trunk(shape, True) * made.tangent
    return RoleWork(
        role,
        share,
        made,
        gradient=(whole + backward(shape)) * made.plain,
        targets=whole * made.own + read(shape) * made.still + (none if by_teacher else again + mixed),
        tangents=(whole_tangent + backward(shape, True)) * made.tangent + whole_tangent * made.own_tangent,
        teacher=whole * made.teacher + (again + mixed if by_teacher else none),
        recomputed=trunks if checkpointing else none,
    )


def roles(
    shape: Shape, config: ObjectiveConfig, *, teacher: bool, tiled: bool, checkpointing: bool = False
) -> tuple[RoleWork, ...]:
    """The mixture of an objective: roles that occur, with their shares of the sequences."""
    off = config.off_diagonal
    shares = {"diagonal": 1 - off, config.loss: off * (1 - config.anchor), "anchor": off * config.anchor}
    return tuple(
        role_work(
            shape,
            role,
            share,
            calls(role, teacher, tiled=tiled, skip=shape.skip),
            checkpointing=checkpointing,
        )
        for role, share in shares.items()
        if share > 0
    )


def per_token(mixture: tuple[RoleWork, ...], part: str = "total") -> Work:
    """The mean over tokens of one of `RoleWork`'s parts."""
    assert part == "total" or part in {field.name for field in fields(RoleWork)}
    return sum((getattr(role, part) * role.share for role in mixture), Work())


def gram(shape: Shape) -> Number:
    """FLOPs of W'W, its lower triangle in strips, and of its gradient, once for each pass with gradient, whatever its
    tokens; 0 where x is made."""
    if not shape.projects:
        return 0.0
    lower = sum((stop - start) * stop for start, stop in gram_strips(shape.width))
    return 2 * shape.vocabulary * (lower + shape.width**2)


def muon_step(shape: Shape) -> Number:
    """FLOPs of Muon's orthogonalisation of the blocks' matrices, per step: three products, five times."""
    d, r = shape.width, shape.mlp_ratio
    sizes = ((d, 3 * d), (d, d), (min(d, r * d), max(d, r * d)), (min(d, r * d), max(d, r * d)))
    return shape.blocks * NEWTON_SCHULZ_STEPS * sum(4 * m * m * k + 2 * m**3 for m, k in sizes)
