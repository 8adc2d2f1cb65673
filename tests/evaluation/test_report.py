import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from catmaps.errors import UserError
from catmaps.evaluation.quality import Quality
from catmaps.evaluation.report import (
    CallsRow,
    ClockBin,
    CurvePoint,
    NelboPoint,
    ReportData,
    TrajectoryRow,
    report_html,
    write_report,
)

pytest.importorskip("matplotlib")

VOID = {"meta", "br", "path", "use", "rect", "image", "circle", "line"}
HEADINGS = {
    "Training",
    "Quality over network calls",
    "Samples",
    "One text on its way from noise",
    "Configuration",
}


class Page(HTMLParser):
    """Checks that tags are balanced; collects text, headings and what is linked to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def some_quality(forward: float = 2.0) -> Quality:
    values: dict[str, float] = dict.fromkeys(Quality.__dataclass_fields__, 1.0)
    values |= {"forward_bits": forward, "reverse_chars": 9, "num_samples": 9, "num_chars": 9, "num_texts": 9}
    return Quality(**values)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def data() -> ReportData:
    steps = range(0, 30_000, 10)
    return ReportData(
        run_name="run <1> & more",
        summary="a > b",
        figures=[("parameters", "4,700,000")],
        config=[("preset", "<small>")],
        curve=[CurvePoint(step, 1.0 + math.exp(-step / 3000)) for step in steps],
        clock=[ClockBin(tau / 8, 2.0 - tau / 5, 0.9 - tau / 10) for tau in range(9)],
        nelbo=[NelboPoint(100, 2.5, 0.02), NelboPoint(200, 2.463, 0.011)],
        rows=[CallsRow("map", 4, some_quality(2.25)), CallsRow("base", 64, some_quality(2.5))],
        controls={"i.i.d. letters": some_quality(11.8)},
        reference=some_quality(1.677),
        samples={4: ["four <b>calls</b>"], 1: ["one call here"]},
        real_samples=["real & true"],
        trajectory=[
            TrajectoryRow("t = 0.00", ["a", " ", "<", "\n"], [0.0, 0.26, 1.0, math.nan]),
            TrajectoryRow("t = 1.00", ["the", " cat"], [0.97, 1.2]),
        ],
    )


def test_the_page_is_one_file_that_needs_nothing_else(data: ReportData, tmp_path: Path) -> None:
    write_report(tmp_path / "new" / "report.html", data)
    html = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert page.tags.count("svg") == 4
    assert "url(http" not in html
    assert "@import" not in html


def test_everything_given_is_shown_and_escaped(data: ReportData) -> None:
    page = Page(report_html(data))
    assert HEADINGS.issubset(page.texts)
    text = " ".join(page.texts)
    for shown in ("run <1> & more", "a > b", "<small>", "four <b>calls</b>", "real & true", "2.463 ± 0.011"):
        assert shown in text
    for shown in ("2.250 ± 1.000", "11.800 ± 1.000", "1.677 ± 1.000", "1 call", "4 calls", "t = 0.00"):
        assert shown in text
    assert "b" not in page.tags  # the sample's own markup is text


def test_samples_come_in_order_of_calls(data: ReportData) -> None:
    html = report_html(data)
    assert html.index("one call here") < html.index("four &lt;b&gt;") < html.index("real &amp; true")


def test_confidence_becomes_a_colour_class(data: ReportData) -> None:
    html = report_html(data)
    spans = re.findall(r'<span class="(c\d+)" title="([\dna.]+)">([^<]*)</span>', html)
    assert spans == [
        ("c0", "0.00", "a"),
        ("c3", "0.26", " "),
        ("c10", "1.00", "&lt;"),
        ("c0", "nan", "⏎"),
        ("c10", "0.97", "the"),
        ("c10", "1.20", " cat"),
    ]
    assert all(f".c{level} {{" in html for level in range(11))


def test_nothing_to_show_is_no_error() -> None:
    page = Page(report_html(ReportData(run_name="empty")))
    assert "empty" in page.texts
    assert not HEADINGS & set(page.texts)
    assert "svg" not in page.tags


@pytest.mark.parametrize(
    ("missing", "heading"),
    [
        ({"curve": (), "clock": (), "nelbo": ()}, "Training"),
        ({"rows": (), "controls": {}, "reference": None}, "Quality over network calls"),
        ({"samples": {}, "real_samples": ()}, "Samples"),
        ({"trajectory": ()}, "One text on its way from noise"),
        ({"config": ()}, "Configuration"),
    ],
)
def test_a_section_without_data_is_left_out(data: ReportData, missing: dict, heading: str) -> None:
    page = Page(report_html(replace(data, **missing)))
    assert HEADINGS.difference(page.texts) == {heading}


@pytest.mark.parametrize(
    "part",
    [
        {"curve": [CurvePoint(0, 3.0)]},
        {"curve": [CurvePoint(i, math.nan if i == 30 else 2.0) for i in range(100)]},
        {"curve": [CurvePoint(i, math.nan) for i in range(3)]},
        {"nelbo": [NelboPoint(10, 2.5, math.nan)]},
        {"clock": [ClockBin(0.5, 1.0, 0.5)]},
        {"rows": [CallsRow("map", 1, some_quality())]},
        {"rows": [CallsRow(f"{i}", 3, some_quality()) for i in range(9)]},
        {"reference": some_quality()},
        {"samples": {1: ["a"]}},
        {"real_samples": ["a"]},
    ],
)
def test_scraps_of_data_are_shown(part: dict) -> None:
    html = report_html(ReportData(run_name="scraps", **part))
    Page(html)
    assert "scraps" in html


def test_the_same_data_give_the_same_file(data: ReportData) -> None:
    assert report_html(data) == report_html(data)


def test_a_long_curve_makes_no_long_file(data: ReportData) -> None:
    losses = np.random.default_rng(0).random(200_000)
    curve = [CurvePoint(i, float(loss)) for i, loss in enumerate(losses)]
    assert len(report_html(ReportData(run_name="long", curve=curve))) < 150_000


def test_confidences_must_match_tokens() -> None:
    with pytest.raises(ValueError, match="2 tokens, 1 confidences"):
        TrajectoryRow("t", ["a", "b"], [0.5])


def test_without_the_plotting_library_the_mend_is_named(data: ReportData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.ticker", None)
    with pytest.raises(UserError, match=r"catmaps\[report\]"):
        report_html(data)
