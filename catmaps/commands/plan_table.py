"""A plan for people, and for JSON."""

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from catmaps.training.flops import Work
    from catmaps.training.planner import Plan
    from catmaps.training.simulation import Comparison, Simulated

PASSES = ("gradient", "targets", "tangents", "teacher", "recomputed")


def size(value: float | int) -> str:
    """Bytes, in powers of 1,000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:,.2f} {unit}"
    return f"{value:.0f} B"


def number(value: float | int) -> str:
    for unit, scale in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:,.2f} {unit}"
    return f"{value:,.0f} "


def span(seconds: float | int) -> str:
    for unit, scale in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds:,.2f} seconds"


Rows = list[tuple[str, str, str]]


def _head(made: "Plan") -> Rows:
    cluster, config, count = made.cluster, made.config, made.parameters
    shared = f"state sharded over {made.shard}" if made.shard > 1 else "a replica on each"
    there = {f.name: getattr(count, f.name) for f in fields(count) if getattr(count, f.name)}
    parts = ", ".join(f"{name} {number(value).strip()}" for name, value in there.items())
    batch = f"{config.training.batch:,} sequences of {made.shape.length:,}"
    each = f"{batch}; a device makes {made.sequences} in {made.passes} x {made.micro_batch}"
    return [
        (
            "cluster",
            f"{cluster.gpus} x {cluster.hardware.name}",
            f"{shared}; {number(cluster.hardware.flops)}FLOP/s each",
        ),
        ("parameters", number(count.total).strip(), parts),
        ("vocabulary", f"{made.shape.vocabulary:,}", f"{config.network.input} input"),
        ("batch", f"{number(made.step_tokens)}tokens", each),
    ]


def _memory(made: "Plan") -> Rows:
    m, held = made.memory, made.cluster.checkpointing
    rows = [
        ("weights", m.weights, "fp32"),
        ("gradients", m.gradients, "fp32"),
        ("optimiser", m.optimiser, made.config.optimiser.name),
        ("moving average", m.average, "fp32"),
        ("teacher", m.teacher, "fp32, frozen"),
        ("copies", m.copies, "gathered weights" if made.shard > 1 else "low-precision weights"),
        ("reduction", m.reduction, "flat buffer of gradients"),
        (
            "activations",
            m.activations,
            "not in the total" if held else "compiled" if made.config.training.compile else "eager",
        ),
        ("activations, checkpointed", m.activations_checkpointed, "" if held else "not in the total"),
        ("working memory", m.working, "of a block's backward pass"),
        ("head's gradient", m.head_gradient, "fp32, while tiles add to it"),
        ("vocabulary-wide, tiled", m.tile, f"{made.tile_positions:,} positions at once"),
        ("vocabulary-wide, dense", m.dense, "not in the total: what a micro-batch would take without tiles"),
    ]
    share = made.bytes_used / made.cluster.hardware.memory
    total = ("total", size(made.bytes_used), f"{share:.0%} of {size(made.cluster.hardware.memory)}")
    return [(name, size(value), note) for name, value, note in rows if value > 0] + [total]


def _flops(made: "Plan") -> Rows:
    from catmaps.training.flops import Work, per_token

    def parts(work: "Work") -> str:
        return ", ".join(f"{f.name} {getattr(work, f.name) / 1e6:,.2f}" for f in fields(Work) if getattr(work, f.name))

    rows: Rows = [("per token", f"{number(made.flops_per_token)}FLOP", "M: " + parts(per_token(made.mixture)))]
    for name in PASSES:
        work = per_token(made.mixture, name)
        if work.total:
            rows.append((f"  {name}", f"{number(work.total)}FLOP", parts(work)))
    for role in made.mixture:
        note = ", ".join(f"{key} {value}" for key, value in asdict(role.calls).items() if value)
        rows.append(
            (f"  {role.role} rows", f"{number(role.total.total)}FLOP", f"{role.share:.1%} of the batch; {note}")
        )
    e = made.elementwise
    wide = f"{number(e.normals)}normals, {number(e.exponentials)}exponentials per token"
    return [*rows, ("elementwise", "not counted", wide), ("training", f"{number(made.flops)}FLOP", "")]


def _bill(made: "Plan") -> Rows:
    t = made.traffic
    return [
        ("tokens", number(made.tokens).strip(), f"{made.steps:,} steps"),
        ("step", span(made.step_seconds), f"at {made.cluster.mfu:.0%} of the peak"),
        (
            "rate",
            f"{number(made.tokens_per_second)}tokens/s",
            f"{made.tokens_per_second / made.cluster.gpus:,.0f} a device",
        ),
        ("time", span(made.seconds), f"{made.device_hours:,.1f} device-hours"),
        (
            "traffic",
            f"{size(t.total)} a step",
            f"sent by a device: gathers {size(t.gather)}, scatters {size(t.scatter)}, all-reduce {size(t.reduce)}",
        ),
        ("bandwidth", f"{size(made.bandwidth)}/s", "a device; with less, communication is the bottleneck"),
        ("checkpoint", size(made.checkpoint), "weights, average, optimiser"),
        ("exported", size(made.exported), "model.safetensors"),
        ("data", size(made.data), "token shards, every token once"),
    ]


def verdict(made: "Plan", mend: tuple[str, ...]) -> str:
    from catmaps.training.planner import USABLE

    have = f"{size(made.cluster.hardware.memory)} ({USABLE:.0%} usable)"
    if made.fits:
        return f"fits: {size(made.bytes_used)} of {have}"
    return f"does not fit: {size(made.bytes_used)} of {have}. What helps: {'; '.join(mend)}"


def show(name: str, made: "Plan", mend: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=120)
    console.print(f"[bold]{name}")
    sections = {
        "": _head(made),
        "memory per device": _memory(made),
        "matrix products": _flops(made),
        "bill": _bill(made),
    }
    for title, rows in sections.items():
        table = Table(
            box=None, title=title, title_justify="left", title_style="bold", show_header=False, pad_edge=False
        )
        table.add_column(width=25)
        table.add_column(justify="right", width=16)
        table.add_column()
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(verdict(made, mend), style="green" if made.fits else "red")


def show_simulation(done: "Simulated", rows: "tuple[Comparison, ...]") -> None:
    from rich.console import Console
    from rich.table import Table

    took = f"built in {span(done.build_seconds)}, a step in {span(done.step_seconds)}, {size(done.peak_bytes)} in all"
    table = Table(
        "planned",
        "simulated",
        box=None,
        title=f"device 0 of {done.processes}, simulated: {took}",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    table.columns[0].justify = table.columns[1].justify = "right"
    table.add_column("")
    for row in rows:
        table.add_row(
            f"{row.planned:,.0f}", f"{row.simulated:,.0f}", row.name + ("" if row.agrees else "  [red]not as planned")
        )
    Console(highlight=False, width=120).print(table)


def as_dict(made: "Plan", mend: tuple[str, ...]) -> dict[str, Any]:
    """Everything in base units: bytes, FLOPs, seconds."""
    from catmaps.training.flops import per_token

    return {
        "config": asdict(made.config),
        "cluster": asdict(made.cluster) | {"shard": made.shard},
        "vocabulary": made.shape.vocabulary,
        "parameters": asdict(made.parameters) | {"total": made.parameters.total},
        "memory": asdict(made.memory) | {"total": made.bytes_used, "tile_positions": made.tile_positions},
        "flops_per_token": {
            "total": made.flops_per_token,
            "parts": asdict(per_token(made.mixture)),
            "passes": {name: asdict(per_token(made.mixture, name)) for name in PASSES},
            "roles": {role.role: {"share": role.share, "total": role.total.total} for role in made.mixture},
        },
        "elementwise_per_token": asdict(made.elementwise),
        "tokens": made.tokens,
        "steps": made.steps,
        "flops": made.flops,
        "step_seconds": made.step_seconds,
        "seconds": made.seconds,
        "tokens_per_second": made.tokens_per_second,
        "device_hours": made.device_hours,
        "traffic": asdict(made.traffic) | {"total": made.traffic.total, "bandwidth": made.bandwidth},
        "files": {"checkpoint": made.checkpoint, "exported": made.exported, "data": made.data},
        "fits": made.fits,
        "verdict": verdict(made, mend),
        "advice": list(mend),
    }
