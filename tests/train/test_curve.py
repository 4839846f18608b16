"""The page of a run: every line is drawn where its numbers are, whatever the numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from saccade.train.curve import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Table, _ticks, write_curve, write_page


def lines(page: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'd="M([^"]+)"><title>', page)
    return [[(float(x), float(y)) for x, y in (spot.split(",") for spot in one.split("L"))] for one in found]


def drawn(tmp_path: Path, points: list[tuple[float, float]], **more: float) -> list[tuple[float, float]]:
    chart = Chart(title="a", x="x", y="y", lines={"one": points}, **more)
    return lines(write_page(tmp_path / "page.html", "t", {}, [chart]).read_text())[0]


def test_points_lie_where_they_should(tmp_path: Path) -> None:
    spots = drawn(tmp_path, [(0, 0.0), (50, 0.25), (100, 1.0)], low=0.0, high=1.0)
    quarter = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) / 4
    assert (tmp_path / "page.html").read_text().count("<circle") == 3  # few points are marked: a single one would not show
    assert spots == [(LEFT, HEIGHT - BOTTOM), ((LEFT + WIDTH - RIGHT) / 2, quarter), (WIDTH - RIGHT, TOP)]


@pytest.mark.parametrize("values", [[1e30, 1e30], [0.0], [-5.0, -5.0, -5.0], [1e-12, 3e-12], [2.0, math.nan, 3.0, math.inf], [7.0] * 5000])
def test_any_numbers_can_be_drawn(tmp_path: Path, values: list[float]) -> None:
    spots = drawn(tmp_path, list(enumerate(values, 1)))
    assert 1 <= len(spots) <= 600 and all(LEFT <= x <= WIDTH - RIGHT and TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1 for x, y in spots)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.31, 4.2), (-3.0, 250.0), (0.5, 0.5), (1e-5, 3e-3)])
def test_ticks_are_few_and_cover_the_range(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert 3 <= len(ticks) <= 8 and ticks == sorted(ticks) and ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9


def test_the_page_of_a_run(tmp_path: Path) -> None:
    rows = [{"step": i, "seconds": float(i), "tokens": 10 * i, "loss": 5.0 / i, "rate": 0.1, "gradient norm": 1.0} for i in range(1, 5)]
    rows[-1] |= {"eval loss": 1.2, "eval accuracy": 0.5, "eval bits": 1.7}
    page = write_curve(rows, {"data": {"set": "<mqar>"}, "seed": 3, "steps": None}, tmp_path / "curve.html").read_text()
    assert "&lt;mqar&gt;" in page and "<mqar>" not in page and "0.5000" in page and "<h2>Bits</h2>" in page
    assert [len(line) for line in lines(page)] == [4, 1, 1, 1, 4] and "script" not in page and "http" not in page.split("<style>")[1]
    assert "Nothing was measured yet" in write_curve([], {}, tmp_path / "empty.html").read_text()


def test_tables_and_names_are_escaped(tmp_path: Path) -> None:
    table = Table(title="T", header=["a", "b"], rows=[["<b>", "1"]])
    page = write_page(tmp_path / "page.html", "a & b", {"k": "<v>"}, [], [table]).read_text()
    assert "<td>&lt;b&gt;</td>" in page and "a &amp; b" in page and "<dd>&lt;v&gt;</dd>" in page
