"""What can't run says why and takes nothing else with it; what ran is kept; growth and comparisons on made-up rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from saccade.bench import result
from saccade.bench.case import Case, Contestant, Field, Run, Settings, Skip, Work
from saccade.bench.compare import compare
from saccade.bench.growth import exponent, growth
from saccade.bench.runner import bad_rows, run_cases
from saccade.bench.timing import Times, percentile

SMALL = Settings(device="cpu", dtype=torch.float32, budget_ms=1)
ONE = Work(flops=2e6, bytes=1e6, unit="FLOP")


class Judge:
    def judge(self, outputs: tuple[torch.Tensor, ...]) -> tuple[float, float]:
        return float(outputs[0].sum()), 0.5


def contestant(
    name: str, value: float = 0.0, role: Any = "ours", error: Exception | None = None, when: str = "call", **more: Any
) -> Contestant:
    calls = []

    def make() -> Run:
        if error is not None and when == "make":
            raise error

        def call() -> torch.Tensor:
            calls.append(1)
            if error is not None and (when == "call" or len(calls) > 2):
                raise error
            return torch.full((1,), value)

        return Run(call=call, impl="plain")

    return Contestant(name=name, role=role, work=ONE, make=make, **more)


def case(*contestants: Contestant, n: int = 8, need: float = 0, build: Any = None, **field: Any) -> Case:
    return Case(
        family="toy", shape={"n": n}, need=need, build=build or (lambda s: Field(contestants=list(contestants), check=Judge(), **field))
    )


def rows_of(*cases: Case, settings: Settings = SMALL, **options: Any) -> list[dict[str, Any]]:
    return run_cases("attend", "quick", list(cases), settings, **options)["rows"]


def test_what_cases_share_is_timed_once() -> None:
    broken = contestant("SDPA", role="dense", shared="x", error=ValueError("no"))
    once = contestant("SDPA", role="dense", shared="x")
    never = contestant("SDPA", role="dense", shared="x", error=RuntimeError("timed again"))
    other = contestant("SDPA", role="dense", shared="y")
    rows = rows_of(*(case(contestant("saccade"), c, n=n) for n, c in enumerate((broken, once, never, other))))
    dense = [row for row in rows if row["role"] == "dense"]
    assert [row["status"] for row in dense] == ["failed", "ok", "ok", "ok"]
    assert dense[1]["ms"] == dense[2]["ms"] and dense[2]["case"] == {"n": 2} and "once" in dense[2]["note"] and not dense[3]["note"]
    assert all(row["ratio"] for row in rows if row["role"] == "ours" and row["case"]["n"])


def test_a_row_says_everything() -> None:
    three = contestant("saccade", select=lambda: None), contestant("SDPA", role="dense"), contestant("fla", role="peer")
    found = rows_of(case(*three, density=0.25))
    ours, dense, peer = found
    assert [row["status"] for row in found] == ["ok"] * 3 and set(ours) == set(result.row())
    assert ours["ms_low"] <= ours["ms"] <= ours["ms_high"] and ours["repeats"] >= 3 and ours["first_call_ms"] > 0
    assert ours["rate"] == pytest.approx(2e6 / ours["ms"] / 1e9) and ours["unit"] == "FLOP" and ours["intensity"] == 2
    assert ours["ratio"] == pytest.approx(dense["ms"] / (ours["ms"] + ours["selection_ms"])) and dense["ratio"] == 1 == peer["ratio_peer"]
    assert (ours["error"], ours["allowed"], ours["ok"], ours["impl"], ours["density"]) == (0, 0.5, True, "plain", 0.25)
    assert ours["peak_bytes"] is None and peer["selection_ms"] is None


@pytest.mark.parametrize("when", ["make", "call", "later"])
def test_one_that_breaks_leaves_the_others(when: str) -> None:
    found = rows_of(
        case(contestant("saccade", error=RuntimeError("bad\nlaunch"), when=when), contestant("SDPA", role="dense")),
        case(contestant("saccade")),
    )
    assert [row["status"] for row in found] == ["failed", "ok", "ok"] and found[0]["note"] == "RuntimeError: bad" and found[0]["ms"] is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Skip("it is not installed"), "it is not installed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("No available kernel. Aborting execution."), "No available kernel"),
        (ValueError("scan: impl \"triton\" can't run this: no gradients"), "can't run"),
    ],
)
def test_what_is_absent_is_skipped(error: Exception, words: str) -> None:
    found = rows_of(case(contestant("saccade", error=error), contestant("SDPA", role="dense")))
    assert [row["status"] for row in found] == ["skipped", "ok"] and words in found[0]["note"]


def test_memory_time_and_tensors_that_can_not_be_made() -> None:
    def broken(s: Settings) -> Field:
        raise ValueError("no such shape")

    found = rows_of(case(contestant("saccade"), need=1e18), case(build=broken), case(contestant("saccade")))
    assert [row["status"] for row in found] == ["skipped", "failed", "ok"]
    assert "GB are free" in found[0]["note"] and "no such shape" in found[1]["note"]
    late = rows_of(case(contestant("saccade")), settings=Settings(device="cpu", dtype=torch.float32, limit_s=0))
    assert late[0]["status"] == "skipped" and "are over" in late[0]["note"]


def test_the_result_is_saved_after_each_case_and_survives_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"

    def stop(s: Settings) -> Field:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows_of(case(contestant("saccade")), case(build=stop), save=lambda document: result.save(document, path))
    kept = result.load(path)
    assert len(kept["rows"]) == 1 and kept["complete"] is False and list(tmp_path.iterdir()) == [path]


def test_bad_rows_are_ours_only() -> None:
    document = {"rows": rows_of(case(contestant("saccade", 1.0), contestant("int8", math.inf, role="peer")))}
    assert [row["ok"] for row in document["rows"]] == [False, False] and document["rows"][1]["error"] == 1e30
    assert [row["contestant"] for row in bad_rows(document)] == ["saccade"]


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, words in (("{", "not JSON"), ("[]", "expected an object"), ('{"schema": "other"}', "has schema"),
                        ('{"schema": "saccade.bench/1", "rows": []}', "no rows"),
                        ('{"schema": "saccade.bench/1", "rows": [{"case": {}}]}', "damaged"),
                        ('{"schema": "saccade.bench/1", "rows": [{"case": {}, "op": "scan", "family": "a", "contestant": "b", '
                         '"status": "ok", "ms": "1"}]}', "expected a number")):  # fmt: skip
        path.write_text(text)
        with pytest.raises((ValueError, TypeError), match=words):
            result.load(path)
    with pytest.raises(ValueError, match="has no colour"):
        result.row(colour=1)


def made_up(ms: dict[int, float], contestant: str = "saccade", spread: float = 0.01, **more: Any) -> list[dict[str, Any]]:
    common: dict[str, Any] = {"op": "attend", "family": "toy", "role": "ours", "status": "ok", "contestant": contestant, **more}
    return [
        result.row(**common, case={"n": n, "heads": 2}, ms=t, ms_low=t * (1 - spread), ms_high=t * (1 + spread)) for n, t in ms.items()
    ]


def test_the_exponent_is_the_slope_in_logarithms() -> None:
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0) and exponent([1024, 4096], [1, 4]) == pytest.approx(1.0)
    assert exponent([1, 2, 4, 8], [1, 2.2, 3.8, 8.1]) == pytest.approx(1.0, abs=0.03) and exponent([5, 5], [1, 2]) is None
    rows = [*made_up({1024: 1, 2048: 4, 4096: 16}), *made_up({1024: 2.0, 2048: 2 * 2**1.5}, "SDPA"), *made_up({1024: 1}, "fla")]
    skipped = [{**made_up({8192: 1})[0], "status": "skipped", "ms": None}]
    found = growth([*rows, *skipped])
    assert [(line["contestant"], round(line["exponent"], 6)) for line in found] == [("saccade", 2.0), ("SDPA", 1.5)]
    assert found[0]["lengths"] == [1024, 2048, 4096] and found[0]["case"] == {"heads": 2} and found[0]["family"] == "toy"


def test_rows_that_changed_by_more_than_their_spread() -> None:
    old = {"op": "attend", "rows": made_up({1: 10.0, 2: 10.0, 3: 10.0, 4: 10.0, 5: 10.0}), "environment": {"torch": "1"}, "settings": {}}
    new_rows = made_up({1: 10.1, 2: 12.0, 3: 8.0, 6: 1.0})
    new_rows += [{**made_up({4: 1.0})[0], "status": "failed", "ms": None, "note": "broke"}]
    new = {"op": "attend", "rows": new_rows, "environment": {"torch": "2"}, "settings": {}}
    found = compare(old, new)
    assert [(c.case["n"], None if c.percent is None else round(c.percent)) for c in found.changes] == [(4, None), (2, 20), (3, -20)]
    assert found.same == 1 and found.unmatched == 2 and found.warnings == ["torch was 1 and is 2"]
    assert [c.case["n"] for c in found.slower_than(10)] == [4, 2] and [c.case["n"] for c in found.slower_than(50)] == [4]
    peers = compare({**old, "rows": made_up({1: 1.0}, "fla", role="peer")}, {**new, "rows": made_up({1: 9.0}, "fla", role="peer")})
    assert len(peers.changes) == 1 and not peers.slower_than(1)
    with pytest.raises(ValueError, match="results of one op"):
        compare(old, {**new, "op": "scan"})


def test_percentiles() -> None:
    assert Times.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Times(median=3.5, low=2.0, high=5.0, repeats=6)
    assert percentile([7.0], 0.2) == 7.0
    assert json.dumps(result.row(ms=1.0))
