"""The plain words: each sentence appears when it is true, and only then."""

from __future__ import annotations

import pytest

from saccade.report.result import read
from saccade.report.summary import findings
from saccade.report.view import build


def row(method, score, cache=1.0, prefill=1.0, decode=1.0, **more):
    base = {"method": method, "task": "needle", "length": 4096, "mode": "aware", "status": "ok", "score": score}
    sizes = {"kv_bytes": 1000 * cache, "index_bytes": 0, "kv_bytes_dense": 1000}
    return base | sizes | {"prefill_speedup": prefill, "decode_speedup": decode} | more


def told(*rows):
    return [f.text for f in findings(build(read({"schema": "saccade.compare/1", "rows": list(rows)})["rows"]), "aware")]


DENSE = row("dense", 0.96)


def test_the_smallest_cache_near_dense_is_named():
    lines = told(DENSE, row("snapkv", 0.95, 0.25), row("adakv", 0.93, 0.1), row("kivi", 0.5, 0.05))
    assert lines[0] == (
        "Smallest cache near dense: adakv scores 0.93 where dense scores 0.96, and holds 10% of the dense cache."
    )


def test_where_none_is_near_the_nearest_is_named():
    lines = told(DENSE, row("snapkv", 0.8, 0.25), row("kivi", 0.5, 0.05))
    assert lines[0] == (
        "No smaller cache stays within 5% of dense (0.96). Nearest: snapkv with 0.80 at 25% of the dense cache."
    )


def test_nothing_saves_memory():
    assert "nothing here saves memory" in told(DENSE, row("quest", 0.96, 1.06))[0]


def test_without_dense_there_is_nothing_to_compare_with():
    assert "nothing to compare scores with" in told(row("snapkv", 0.8, 0.25))[0]


@pytest.mark.parametrize("ratio", [0.7, 1.0, 1.04])
def test_nothing_was_faster(ratio):
    lines = told(DENSE, row("snapkv", 0.95, 0.25, prefill=0.9, decode=ratio), row("random", 0.1, 0.25, 2.0, 2.0))
    assert any(
        line.startswith("No method was faster than dense at these lengths, neither in prefill nor in decoding")
        for line in lines
    )


def test_one_phase_was_faster():
    lines = told(DENSE, row("minference", 0.95, prefill=1.5))
    assert (
        "Fastest in prefill: minference, 1.50 times dense at 4,096 tokens, near dense in quality (0.95 against 0.96)."
        in lines
    )
    assert "No method was faster than dense at these lengths in decoding." in lines


def test_speed_with_quality_goes_before_speed_without():
    lines = told(DENSE, row("bad", 0.2, prefill=3.0), row("good", 0.95, prefill=1.2))
    assert any(line.startswith("Fastest in prefill: good, 1.20") for line in lines)
    lines = told(DENSE, row("bad", 0.2, prefill=3.0))
    assert any("bad, 3.00 times dense" in line and "not near dense in quality" in line for line in lines)


def test_speed_that_was_not_measured_is_not_called_slow():
    lines = told(DENSE, row("a", 0.9, 0.5, prefill=None, decode=None))
    assert "Speed against dense was not measured." in lines
    lines = told(DENSE, row("a", 0.9, 0.5, prefill=None, decode=0.9))
    assert "No method was faster than dense at these lengths, in decoding (best ratio 0.90)." in lines
    assert not any("prefill" in line for line in lines)


def test_no_better_than_random():
    floor = row("random(budget=0.25)", 0.4, 0.25)
    lines = told(DENSE, floor, row("h2o", 0.4, 0.25), row("kivi", 0.3, 0.1), row("snapkv", 0.9, 0.25))
    assert "h2o is no better than evicting at random with a cache of that size or smaller." in lines


def test_failures_are_counted_and_the_first_is_told():
    failed = row("quest", None, status="failed", error="out of memory", task="copy")
    lines = told(DENSE, failed)
    assert "1 of 2 cells failed, in quest. First: copy at 4,096 tokens: out of memory." in lines
    assert "The one cell ran." in told(DENSE)


def test_many_failed_methods_are_counted_not_listed():
    lines = told(DENSE, *(row(f"m{i}", None, status="failed", error="no.") for i in range(6)))
    assert any("in m0, m1, m2, m3 and 2 more. First" in line for line in lines)


def test_tasks_that_dense_fails_are_named():
    lines = told(DENSE, row("dense", 0.2, task="variables", discriminating=False))
    assert "Left out of every mean, because dense itself fails there: variables at 4,096." in lines


def test_bits_count_downwards():
    dense = row("dense", 0.5, unit="bits")
    assert "snapkv scores 0.520 bits" in told(dense, row("snapkv", 0.52, 0.25, unit="bits"))[0]
    assert told(dense, row("snapkv", 0.6, 0.25, unit="bits"))[0].startswith("No smaller cache")
