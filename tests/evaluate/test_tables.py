"""The quality tables: order, twins, a time limit, going on, failures, and the pages that are written from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.tiny import tiny

from saccade.core import Calibrated
from saccade.evaluate import lineups, markdown, tables
from saccade.evaluate.contenders import contender
from saccade.evaluate.lineups import CACHE, PREFILL, Entry, entries, filled
from saccade.evaluate.tables import run_table
from saccade.evaluate.twins import judge, twin_of, worse_than_random
from saccade.methods import load
from saccade.report.result import read

LENGTH = 400


def small(kind: str = "prefill", **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "lengths": [LENGTH], "samples": 2, "tasks": ["needle"], "modes": ["aware"], "systems": ["fna", "sampleattention"],
        "aims": ["0.4", "0.1"], "layers": False, "name": "tiny",
    }  # fmt: skip
    return run_table(kind, *tiny(), **settings | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    path = tmp_path_factory.mktemp("table") / "table.json"
    return small(layers=True, json_path=path), path


def test_every_method_stands_beside_a_random_twin_of_its_density(made: tuple[dict[str, Any], Path]) -> None:
    result, path = made
    assert json.loads(path.read_text()) == json.loads(json.dumps(result)) and result["table"]["missing"] == []
    rows = {row["method"]: row for row in result["rows"]}
    assert next(iter(rows)) == "dense"
    own = [row for row in rows.values() if row["aim"] is not None]
    assert [(row["system"], row["aim"]) for row in own] == [
        ("sampleattention", "0.4"), ("fna", "0.4"), ("sampleattention", "0.1"), ("fna", "0.1"),
    ]  # fmt: skip
    for row in own:
        twin = rows[row["twin"]]
        # so short a prompt leaves no room below a few tiles that are always read
        assert twin["prefill_density"] >= 0.9 * row["prefill_density"]
        assert row["kv_bytes_dense"] == rows["dense"]["kv_bytes"] and row["status"] == "ok" and row["samples"] == 2
        assert len(row["output_error"]) == len(row["mass"]) == 2 and all(0 < mass <= 1 for mass in row["mass"])
        assert row["worse"] is None, "random weights solve nothing: nobody can tell"
    assert rows[own[1]["twin"]]["prefill_density"] == pytest.approx(own[1]["prefill_density"], rel=0.06)
    assert 0.35 < own[1]["prefill_density"] < 0.5 and own[3]["prefill_density"] < 0.2
    assert read(json.loads(path.read_text())), "the page's reader takes it"


def test_a_finished_table_resumes_to_nothing_and_a_wider_one_goes_on(
    made: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, path = made
    ran: list[str] = []
    real = tables._row

    def noted(run: Any, cell: Any, spec: str, *rest: Any) -> dict[str, Any]:
        ran.append(f"{spec.partition('(')[0]} {cell.task.name}")
        return real(run, cell, spec, *rest)

    monkeypatch.setattr(tables, "_row", noted)
    again = small(json_path=path, resume=True)
    assert ran == [] and [row["score"] for row in again["rows"]] == [row["score"] for row in result["rows"]]
    more = small(json_path=path, resume=True, systems=["fna"], tasks=["needle", "dictionary"], aims=["0.4"])
    assert ran == ["dense dictionary", "fna dictionary", "random-tiles dictionary"] and len(more["rows"]) == len(result["rows"]) + 3
    with pytest.raises(ValueError, match="made with other settings, seed"):
        small(json_path=path, resume=True, seed=1)


def test_the_time_limit_stops_between_lines_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, real = [0.0], tables._row

    def slow(*arguments: Any) -> dict[str, Any]:
        clock[0] += 10
        return real(*arguments)

    monkeypatch.setattr(tables, "_row", slow)
    monkeypatch.setattr(tables.time, "perf_counter", lambda: clock[0])
    result = small(lengths=[LENGTH, 300], seconds=25)
    # dense, the first method and its twin take 30 seconds
    assert [row["slug"] for row in result["rows"]] == ["dense", "sampleattention", "random-tiles"]
    assert {row["length"] for row in result["rows"]} == {300}
    assert result["table"]["missing"] == [
        "needle at 300, aware: fna 0.4, sampleattention 0.1, fna 0.1", "needle at 400, aware: everything",
    ]  # fmt: skip


def test_a_failing_line_is_one_row(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lineups.CACHE, "breaks", {"0.5": broken})
    monkeypatch.setitem(lineups.CACHE, "unknown", {"0.5": "no-such-method"})
    result = small("cache", systems=["breaks", "unknown", "snapkv"], aims=["0.5"])
    rows = {row["system"]: row for row in result["rows"]}
    assert rows["breaks"]["status"] == rows["unknown"]["status"] == "failed"
    assert "this policy is broken" in rows["breaks"]["error"] and "no method" in rows["unknown"]["error"]
    assert rows["snapkv"]["status"] == "ok" and rows["snapkv"]["twin"] == "random(budget=0.5132)"
    assert rows["random"]["kv_bytes"] == pytest.approx(rows["snapkv"]["kv_bytes"], rel=0.05)
    text = markdown.text(result)
    assert "| `no-such-method` | - |" in text and "this policy is broken" in text.partition("## Failed")[2]


def test_questions_in_turn_and_plans_made_on_the_way() -> None:
    result = small("cache", systems=["loki", "top-theta"], aims=["0.25"], tasks=[tables.MULTI_TURN], modes=["agnostic"])
    rows = [row for row in result["rows"] if row["aim"]]
    assert [row["system"] for row in rows] == ["top-theta", "loki"]
    assert all(row["status"] == "ok" and len(row["turns"]) == 2 and row["mode"] == "agnostic" for row in rows), rows
    assert rows[0]["method"] == f"top-theta(k={LENGTH // 4}, first_k={LENGTH // 4})"


def row(method: str, score: float, **changes: Any) -> dict[str, Any]:
    return {
        "method": method, "slug": method.partition("(")[0], "task": "needle", "length": 4096, "mode": "aware", "status": "ok",
        "score": score, "low": score - 0.1, "high": score + 0.1, "unit": "accuracy", "discriminating": True, "twin": None, "worse": None,
        "prefill_density": 0.2, "decode_density": 0.3, "kv_bytes": 30, "kv_bytes_dense": 100,
    } | changes  # fmt: skip


def test_worse_than_random_is_told_where_dense_succeeds() -> None:
    bad, near, good = (row(name, score, twin="twin") for name, score in (("bad", 0.1), ("near", 0.45), ("good", 0.9)))
    bits = row("bits", 0.7, twin="twin", task="text", unit="bits")
    rows = [row("twin", 0.5), row("twin", 0.6, task="text", unit="bits"), bad, near, good, bits]
    judge(rows)
    assert [one["worse"] for one in rows] == [None, None, True, True, False, True]
    told = worse_than_random(rows)
    assert told[0] == "bad: needle at 4096, aware: 0.10, twin 0.50"
    assert told[1].startswith("bits: text at 4096, aware: 0.700") and "near" in told[2] and told[2].endswith("(within the intervals)")
    for one in rows:
        one["discriminating"] = False
    judge(rows)
    assert not any(one["worse"] for one in rows)


def test_twins_read_what_the_method_read() -> None:
    assert twin_of("prefill", row("fna", 0), contender("fna")) == "random-tiles(density=0.1978)"
    assert twin_of("cache", row("quest", 0), contender("quest")) == "random(budget=0.2897)"  # what it read of the cache
    assert twin_of("cache", row("h2o", 0), contender("h2o")) == "random(budget=0.2897)"  # what it kept
    assert twin_of("cache", row("zipcache", 0), contender("zipcache")) is None
    assert twin_of("prefill", row("fna", 0, prefill_density=0.99), contender("fna")) is None


def test_specs_follow_the_length_and_the_first_aim_of_all_comes_first() -> None:
    assert filled("a(x={0.25}, y={0.25:64}, z={0.25/64})", 1000) == "a(x=250, y=256, z=4)"
    assert filled("a(x={0.0001/64})", 100) == "a(x=1)"
    lines = entries(CACHE, aims=["0.25"], systems=["quest", "kvquant"])
    assert lines[0] == Entry("quest", "0.25", "quest(budget=0.25)")
    assert [line.aim for line in lines[1:]] == ["8 bits", "4 bits", "3 bits", "2 bits"]
    first = [line.system for line in entries(PREFILL)[: len(PREFILL)]]
    assert first == list(PREFILL)
    with pytest.raises(ValueError, match=r"no budgets 0\.33"):
        entries(CACHE, aims=["0.33"])
    with pytest.raises(ValueError, match="no methods h20"):
        entries(CACHE, systems=["h20"])


def test_the_tables_hold_every_built_method_of_their_families_and_every_spec_can_be_built() -> None:
    from saccade.catalog import catalog

    done = {family: {r.slug for r in catalog().values() if r.family == family and r.status == "done"} for family in (
        "prefill", "static", "decode", "cache", "kvcomp",
    )}  # fmt: skip
    assert done["prefill"] | done["static"] <= set(PREFILL) and done["decode"] | done["cache"] | done["kvcomp"] <= set(CACHE)
    assert len(PREFILL) == 21
    for table in (PREFILL, CACHE):
        for specs in table.values():
            for template in specs.values():
                for length in (1024, 4096, 16384):
                    contender(filled(template, length))
    for slug, fields in lineups.PLAN_FIELDS.items():
        assert all(hasattr(load(slug), name) for name in fields) and issubclass(load(slug), Calibrated)


@pytest.mark.parametrize(("changes", "says"), [
    ({"kind": "speed"}, "no table 'speed'"), ({"tasks": ["copy"]}, "not scored by exact match"), ({"modes": ["blind"]}, "mode 'blind'"),
    ({"samples": 0}, "samples must be"), ({"seconds": 0.0}, "is no time"), ({"lengths": []}, "are not whole numbers"),
    ({"tasks": ["text"], "modes": ["agnostic"]}, "no cell"), ({"resume": True}, "no file to resume"),
])  # fmt: skip
def test_what_fits_no_table_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small(**{"kind": "prefill", **changes})
