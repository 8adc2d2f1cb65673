"""The report of a run: one HTML file with plots, figures, samples and a trajectory, readable offline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import NamedTuple

from catmaps.evaluation import plots
from catmaps.evaluation.page import CONFIDENCE_LEVELS, STYLE_SHEET
from catmaps.evaluation.quality import Quality


class CurvePoint(NamedTuple):
    """Loss at a training step."""

    step: int
    loss: float


class ClockBin(NamedTuple):
    """Cross-entropy (nats per token) and squared error of the endpoint at a clock time in [0, 1]."""

    tau: float
    ce: float
    mse: float


class NelboPoint(NamedTuple):
    """The likelihood bound at a training step, in bits per character, with its standard error."""

    step: int
    bits_per_char: float
    stderr: float


class CallsRow(NamedTuple):
    """Sample quality of one sampler (`series`, such as "map, renoise") at a number of network calls."""

    series: str
    calls: int
    quality: Quality


@dataclass(frozen=True)
class TrajectoryRow:
    """The text at one time of sampling: likeliest tokens, and the probability of each.

    Raises ValueError if there are not as many confidences as tokens.
    """

    label: str
    tokens: Sequence[str]
    confidences: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.confidences):
            raise ValueError(f"{self.label}: {len(self.tokens)} tokens, {len(self.confidences)} confidences")


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What a report shows; a section without data is left out.

    Attributes:
        run_name: Title of the page.
        summary: A line below it.
        figures: (label, value) of the run's main figures, shown large.
        config: (label, value) rows of the configuration.
        loss_label: What the training curve shows, with its unit.
        curve, clock, nelbo: See their types; the last NELBO is shown large too.
        rows: Sample quality over the number of calls.
        controls: Quality of texts of known worth, as `control_rows` gives them.
        reference: Quality of held-out text in the form of samples.
        samples: Sampled texts by number of calls.
        real_samples: Held-out texts to read beside them.
        trajectory: One text over the time of its sampling, in order.
    """

    run_name: str
    summary: str = ""
    figures: Sequence[tuple[str, str]] = ()
    config: Sequence[tuple[str, str]] = ()
    loss_label: str = "loss (nats per token)"
    curve: Sequence[CurvePoint] = ()
    clock: Sequence[ClockBin] = ()
    nelbo: Sequence[NelboPoint] = ()
    rows: Sequence[CallsRow] = ()
    controls: Mapping[str, Quality] = field(default_factory=dict)
    reference: Quality | None = None
    samples: Mapping[int, Sequence[str]] = field(default_factory=dict)
    real_samples: Sequence[str] = ()
    trajectory: Sequence[TrajectoryRow] = ()


def write_report(path: Path, data: ReportData) -> None:
    """Write the report as one self-contained HTML file.

    Raises:
        UserError: If there is something to plot and matplotlib is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report_html(data), encoding="utf-8")


def report_html(data: ReportData) -> str:
    """The report as a page of HTML."""
    sections = [
        _header(data),
        _section("Training", _training(data)),
        _section("Quality over network calls", _quality(data)),
        _section("Samples", _samples(data)),
        _section("One text on its way from noise", _trajectory(data.trajectory)),
        _section("Configuration", _config(data.config)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(data.run_name)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def _header(data: ReportData) -> str:
    figures = list(data.figures)
    if data.nelbo:
        last = data.nelbo[-1]
        figures.insert(
            0, ("validation NELBO, bits/char (upper bound)", f"{last.bits_per_char:.3f} ± {last.stderr:.3f}")
        )
    tiles = "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>" for a, b in figures)
    summary = f'<p class="summary">{escape(data.summary)}</p>' if data.summary else ""
    return (
        f"<header>\n<h1>{escape(data.run_name)}</h1>\n{summary}"
        + (f'<dl class="tiles">{tiles}</dl>' if tiles else "")
        + "\n</header>"
    )


def _training(data: ReportData) -> str:
    parts = []
    if data.curve:
        steps, losses = zip(*data.curve, strict=True)
        parts.append(_plot(plots.training_curve(steps, losses, data.loss_label), "Loss over training."))
    if data.nelbo:
        steps, bits, stderrs = zip(*data.nelbo, strict=True)
        caption = "Likelihood bound of held-out text over training; bars are two standard errors."
        parts.append(_plot(plots.nelbo_curve(steps, bits, stderrs), caption))
    if data.clock:
        tau, ce, mse = zip(*data.clock, strict=True)
        caption = "Where in time the error lies: means over bins of clock time."
        parts.append(_plot(plots.clock_curve(tau, ce, mse), caption, wide=True))
    return f'<div class="plots">{"".join(parts)}</div>' if parts else ""


def _plot(svg: str, caption: str, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _quality(data: ReportData) -> str:
    parts = []
    if data.rows:
        forward: dict[str, list[tuple[int, float]]] = {}
        entropy: dict[str, list[tuple[int, float]]] = {}
        for series, calls, quality in data.rows:
            forward.setdefault(series, []).append((calls, quality.forward_bits))
            entropy.setdefault(series, []).append((calls, quality.token_entropy))
        real = data.reference and (data.reference.forward_bits, data.reference.token_entropy)
        caption = "Forward bits: cross-entropy of samples under an n-gram model of the training text. "
        caption += "Token entropy: of single texts; below the held-out line texts repeat themselves."
        svg = plots.calls_curves(forward, entropy, real)
        parts.append(f'<div class="plots">{_plot(svg, caption, wide=True)}</div>')
    if data.rows or data.controls or data.reference:
        parts.append(_quality_table(data))
    return "".join(parts)


def _quality_table(data: ReportData) -> str:
    heads = (
        "samples",
        "calls",
        "forward bits",
        "reverse bits",
        "token entropy",
        "distinct-2",
        "letter entropy",
    )
    head = "".join(f"<th>{name}</th>" for name in (*heads, "valid words", "repetition", "zlib ratio"))
    body = [_quality_cells(series, str(calls), quality, "") for series, calls, quality in data.rows]
    body += [_quality_cells(name, "", quality, "control") for name, quality in data.controls.items()]
    if data.reference is not None:
        body.append(_quality_cells("held-out text (reference)", "", data.reference, "reference"))
    note = "Bits are per character; entropies in nats, of single texts. Reverse bits: cross-entropy of "
    note += "held-out text under an n-gram model fitted to the samples."
    return (
        f'<div class="scroll"><table class="figures"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}'
        f'</tbody></table></div><p class="note">{escape(note)}</p>'
    )


def _quality_cells(name: str, calls: str, quality: Quality, kind: str) -> str:
    cells = (
        calls,
        f"{quality.forward_bits:.3f} ± {quality.forward_stderr:.3f}",
        f"{quality.reverse_bits:.3f}",
        f"{quality.token_entropy:.3f}",
        f"{quality.distinct_2:.3f}",
        f"{quality.letter_entropy:.3f}",
        f"{100 * quality.valid_word_rate:.1f}%",
        f"{100 * quality.repetition_rate:.1f}%",
        f"{quality.zlib_ratio:.3f}",
    )
    data = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr class="{kind}"><th>{escape(name)}</th>{data}</tr>'


def _samples(data: ReportData) -> str:
    def column(title: str, texts: Sequence[str]) -> str:
        return f"<h3>{escape(title)}</h3>" + "".join(f"<blockquote>{escape(t)}</blockquote>" for t in texts)

    left = "".join(
        column(f"{calls} call{'' if calls == 1 else 's'}", texts) for calls, texts in sorted(data.samples.items())
    )
    right = column("Real text", data.real_samples) if data.real_samples else ""
    columns = "".join(f"<div>{side}</div>" for side in (left, right) if side)
    return f'<div class="samples">{columns}</div>' if columns else ""


def _trajectory(rows: Sequence[TrajectoryRow]) -> str:
    if not rows:
        return ""
    steps = range(CONFIDENCE_LEVELS + 1)
    scale = "".join(f'<span class="c{i}">{i / CONFIDENCE_LEVELS:.1f}</span>' for i in steps)
    body = "".join(f"<tr><th>{escape(row.label)}</th><td>{_tokens(row)}</td></tr>" for row in rows)
    return (
        f'<p class="legend">Colour: probability of the likeliest token {scale}</p>'
        f'<div class="scroll"><table class="trajectory"><tbody>{body}</tbody></table></div>'
    )


def _tokens(row: TrajectoryRow) -> str:
    spans = []
    for token, confidence in zip(row.tokens, row.confidences, strict=True):
        level = round(CONFIDENCE_LEVELS * min(max(confidence, 0.0), 1.0)) if confidence == confidence else 0
        shown = escape(token.replace("\n", "⏎").replace("\t", "⇥"))
        spans.append(f'<span class="c{level}" title="{confidence:.2f}">{shown}</span>')
    return "".join(spans)


def _config(rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    body = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in rows)
    return f'<table class="config"><tbody>{body}</tbody></table>'
