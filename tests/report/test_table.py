"""Tables and heat maps as data."""

from __future__ import annotations

import pytest

from saccade.report import table
from saccade.report.result import read
from saccade.report.view import build


def view(*rows):
    base = {"method": "a", "task": "needle", "length": 1024, "status": "ok", "mode": "aware"}
    return build(read({"schema": "saccade.compare/1", "rows": [base | row for row in rows]})["rows"])


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1_234_567, "1.18 MiB"), (5 * 2**40, "5 TiB")],
)
def test_bytes(value, text):
    assert table.bytes_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(4096, "4K"), (1000, "1,000"), (512, "512"), (131072, "128K")])
def test_lengths(value, text):
    assert table.length_text(value) == text


def test_cells_and_sort_keys_run_in_the_columns_order():
    found = table.table_rows(view({"score": 0.5, "low": 0.25, "high": 0.75, "mass": [0.5, 1.0], "kv_bytes": 2048}))[0]
    assert (found["score"], found["interval"]) == ("0.50", "0.25–0.75")
    titles = [column.title for column in table.COLUMNS]
    assert dict(zip(titles, found["cells"], strict=True)) | {"Cache": "2 KiB", "Mass": "0.750"} == dict(
        zip(titles, found["cells"], strict=True)
    )
    assert found["sort"][:5] == [0, "needle", 1024, "aware", 0.5]
    assert found["sort"][5 + titles.index("Mass")] == 0.75


def test_heat_maps_line_up_lengths_and_depths():
    found = table.heat_maps(
        view(
            {"depths": [[0.1, 1.0], [0.9, 0.0]]},
            {"length": 2048, "depths": [[0.5, 0.25]]},
            {"method": "b", "length": 2048, "status": "failed", "error": "no memory"},
            {"task": "copy"},
        )
    )
    assert [(group["task"], group["depths"]) for group in found] == [("needle", ["10", "50", "90"])]
    a, b = found[0]["maps"]
    assert [[cell["text"] for cell in line["cells"]] for line in a["lines"]] == [["100", "–", "0"], ["–", "25", "–"]]
    assert [line["length"] for line in a["lines"]] == ["1K", "2K"]
    assert [line["failed"] for line in b["lines"]] == [False, True]
