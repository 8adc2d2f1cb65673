"""The best place of a line through a few points."""

import math

import pytest

from catmaps.studies.sweeps import Point, between, comparable


def line(values: tuple[float, ...], best: float, sign: float = 1.0, logs: bool = True) -> list[Point]:
    """A parabola, best at `best`."""
    at = math.log if logs else float
    return [Point(x, 3.0 + sign * 0.2 * (at(x) - at(best)) ** 2, 0.01) for x in values]


RATES = (0.005, 0.01, 0.02, 0.04, 0.08)


@pytest.mark.parametrize("best", [0.0083, 0.01, 0.0139, 0.05])
def test_a_parabola_in_the_logarithm_is_found_again(best: float) -> None:
    assert between(line(RATES, best), "lower") == pytest.approx(best)
    assert between(line(RATES, best, sign=-1.0), "higher") == pytest.approx(best)


def test_a_narrow_range_is_looked_at_as_it_is() -> None:
    values = (0.5, 0.6, 0.8, 0.9)  # of unequal steps
    assert between(line(values, 0.71, logs=False), "lower") == pytest.approx(0.71)


def test_nothing_is_claimed_beyond_what_was_tried() -> None:
    assert between(line(RATES, 0.3), "lower") is None
    assert between(line(RATES, 0.001), "lower") is None
    assert between([Point(x, 1.0, 0.1) for x in RATES], "lower") is None  # level: the first is as good as any
    assert between([Point(2.0, 2.0, 0.1), Point(3.0, 1.0, 0.1), Point(4.0, 1.0, 0.1)], "lower") == pytest.approx(3.5)


def test_means_over_fewer_seeds_do_not_compete() -> None:
    points = line(RATES, 0.02)
    lucky = Point(0.005, 2.0, 0.01)
    three = [lucky, *(point._replace(seeds=3) for point in points[1:4]), points[4]]
    assert comparable(three) == three[1:4]
    assert between(comparable(three), "lower") == pytest.approx(0.02)
    assert comparable(points) == points
