"""The chart's numbers: means over the right cells, costs, and the frontier against a brute-force one."""

from __future__ import annotations

import random

import pytest

from saccade.report.result import read
from saccade.report.view import COSTS, Point, build, pareto, row_costs


def row(method, score, task="needle", length=1024, **more):
    base = {"method": method, "task": task, "length": length, "mode": "aware", "status": "ok", "score": score}
    return base | {"kv_bytes": 50, "index_bytes": 10, "kv_bytes_dense": 100, "decode_ms": 2.0, "prefill_ms": 9.0} | more


def view(*rows):
    return build(read({"schema": "saccade.compare/1", "rows": list(rows)})["rows"])


def point(method, cost, score, done=1):
    costs = dict.fromkeys(COSTS, None) | {"cache": cost}
    return Point(method=method, slug=method, length=None, score=score, costs=costs, done=done, cells=1)


def test_means_leave_out_what_does_not_discriminate_and_other_units():
    found = view(
        row("a", 1.0),
        row("a", 0.5, length=2048),
        row("a", 0.1, task="variables", discriminating=False),
        row("a", 0.6, task="perplexity", unit="bits"),
    ).charts["aware"]
    assert found.unit == "accuracy"
    assert found.points[0].score == pytest.approx(0.75)
    assert (found.points[0].done, found.points[0].cells) == (2, 2)
    assert [(p.length, p.score) for p in found.by_length] == [(1024, 1.0), (2048, 0.5)]


def test_bits_stand_in_where_nothing_else_is_there_and_less_is_better():
    found = view(
        row("dense", 0.5, unit="bits", kv_bytes=100), row("a", 0.6, unit="bits"), row("b", 0.7, unit="bits")
    ).charts["aware"]
    assert found.unit == "bits"
    assert found.frontier["cache"] == ["a", "dense"]


def test_a_method_that_failed_somewhere_is_incomplete_and_off_the_frontier():
    failed = row("b", None, length=2048, status="failed", error="out of memory")
    found = view(row("a", 0.5), row("a", 0.5, length=2048), row("b", 1.0), failed).charts["aware"]
    b = found.points[1]
    assert b.score == 1.0 and not b.complete
    assert found.frontier["cache"] == ["a"]


def test_cache_counts_the_index_and_dense_reads_everything():
    clean = view(row("dense", 1.0)).rows[0]
    assert row_costs(clean) == {
        "cache": 0.6,
        "decode_ms": 2.0,
        "prefill_ms": 9.0,
        "prefill_density": 1.0,
        "decode_density": 1.0,
    }
    assert row_costs(clean | {"slug": "snapkv"})["decode_density"] is None
    assert row_costs(clean | {"kv_bytes_dense": None})["cache"] is None


def test_a_cost_missing_in_one_cell_has_no_mean():
    found = view(row("a", 1.0, decode_density=0.2), row("a", 1.0, length=2048)).charts["aware"].points[0]
    assert found.costs["decode_density"] is None and found.costs["cache"] == pytest.approx(0.6)


def test_dense_first_random_last_others_as_they_appear():
    found = view(row("random(budget=0.25)", 0.1), row("quest", 1.0), row("dense", 1.0), row("adakv", 1.0))
    assert found.methods == ["dense", "quest", "adakv", "random(budget=0.25)"]
    assert found.looks["dense"].css == "look-dense" and found.looks["random(budget=0.25)"].css == "look-random"


def test_modes_have_charts_of_their_own():
    found = view(row("a", 1.0), row("a", 0.2, mode="agnostic"))
    assert found.modes == ["aware", "agnostic"]
    assert [found.charts[mode].points[0].score for mode in found.modes] == [1.0, 0.2]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lower", [False, True])
def test_the_frontier_is_what_nothing_dominates(seed, lower):
    rng = random.Random(seed)
    # Few distinct values, so that ties happen.
    points = [point(f"m{i}", rng.randrange(6) / 5, rng.randrange(6) / 5) for i in range(12)]
    sign = -1 if lower else 1

    def beaten(p):
        return any(
            q.costs["cache"] <= p.costs["cache"]
            and sign * q.score >= sign * p.score
            and (q.costs["cache"], q.score) != (p.costs["cache"], p.score)
            for q in points
        )

    best = {(p.costs["cache"], p.score) for p in points if not beaten(p)}
    front = [p for name in pareto(points, "cache", lower_is_better=lower) for p in points if p.method == name]
    assert {(p.costs["cache"], p.score) for p in front} == best
    assert [p.costs["cache"] for p in front] == sorted(p.costs["cache"] for p in front)
    assert len(front) == len(best)  # of twins one stands for both


def test_points_without_a_value_or_with_too_few_cells_never_stand_on_the_frontier():
    assert pareto([point("a", None, 1.0), point("b", 0.1, None), point("c", 0.1, 1.0, done=0)], "cache") == []
