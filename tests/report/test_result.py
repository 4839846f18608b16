"""Reading a result: what is refused, and what a row always has afterwards."""

from __future__ import annotations

import pytest

from saccade.report.result import read

ROW = {"method": "snapkv(budget=0.25)", "task": "needle", "length": 1024, "status": "ok"}


def result(**row):
    return {"schema": "saccade.compare/1", "rows": [ROW | row]}


@pytest.mark.parametrize("schema", ["saccade.compare/2", None, 1])
def test_another_schema_is_refused_in_one_sentence(schema):
    with pytest.raises(ValueError, match=r"^the result has schema .*'saccade\.compare/1'.*$") as caught:
        read({"schema": schema, "rows": [ROW]})
    assert "\n" not in str(caught.value)


def test_only_a_dict_is_a_result():
    with pytest.raises(TypeError, match="not list"):
        read([ROW])


@pytest.mark.parametrize("rows", [None, [], "rows"])
def test_a_result_without_rows_is_refused(rows):
    with pytest.raises(ValueError, match="no rows"):
        read({"schema": "saccade.compare/1", "rows": rows})


@pytest.mark.parametrize("key", ["method", "task", "length", "status"])
def test_a_row_that_can_not_be_told_apart_is_refused(key):
    with pytest.raises(ValueError, match=f"row 0 of the result lacks {key}"):
        read(result(**{key: None}))


def test_a_row_of_another_kind_or_status_is_refused():
    with pytest.raises(ValueError, match="row 0 of the result is str"):
        read({"schema": "saccade.compare/1", "rows": ["row"]})
    with pytest.raises(ValueError, match="status 'fine'"):
        read(result(status="fine"))


def test_numbers_that_json_can_not_say_become_none_and_absent_keys_are_filled():
    row = read(result(score=float("nan"), prefill_ms=float("inf"), mass=[1.0, float("nan")], decode_ms=2.5))["rows"][0]
    assert row["score"] is None and row["prefill_ms"] is None and row["decode_ms"] == 2.5
    assert row["mass"] == [1.0, None]
    assert row["kv_bytes"] is None and row["output_error"] is None and row["depths"] == []
    assert (row["slug"], row["unit"], row["mode"], row["discriminating"]) == ("snapkv", "accuracy", "", True)


def test_text_where_a_number_belongs_is_not_shown_as_one():
    row = read(result(score="0.9", kv_bytes=True))["rows"][0]
    assert row["score"] is None and row["kv_bytes"] is None


def test_the_given_result_is_left_as_it_was():
    given = result(score=float("nan"))
    read(given)
    assert set(given["rows"][0]) == {*ROW, "score"} and "environment" not in given
