"""Spec strings: literals in, literals out, and nothing is ever evaluated."""

from __future__ import annotations

import keyword
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core import Mass, Threshold, format_spec, parse_spec, split_top_level
from tests.core.cases import few

slugs = st.from_regex(r"[a-z0-9][a-z0-9.\-]{0,12}", fullmatch=True)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
)
numbers = st.floats(0, 1, exclude_min=True)
values = st.one_of(
    plain, st.lists(plain.filter(lambda x: not (isinstance(x, float) and math.isinf(x))), max_size=3).map(tuple),
    numbers.map(Mass), st.floats(allow_nan=False).map(Threshold),
)  # fmt: skip
fields = st.dictionaries(names, values, max_size=4)


@few
@given(slugs, fields)
def test_a_spec_is_read_as_it_was_written(slug: str, given_fields: dict) -> None:
    text = format_spec(slug, given_fields)
    back_slug, back = parse_spec(text)
    assert (back_slug, back) == (slug, given_fields)
    assert [type(x) for x in back.values()] == [type(x) for x in given_fields.values()]
    assert parse_spec(f"  {text}\n") == (slug, given_fields)


@few
@given(st.lists(st.tuples(slugs, fields), min_size=1, max_size=4))
def test_a_combination_splits_into_its_specs(parts: list[tuple[str, dict]]) -> None:
    specs = [format_spec(slug, given_fields) for slug, given_fields in parts]
    assert split_top_level("+".join(specs), "+") == specs
    assert split_top_level(" + ".join(specs), "+") == specs


def test_splitting_minds_brackets_and_quotes() -> None:
    assert split_top_level("a(x=(1, 2), y='b,c') , d,, ", ",") == ["a(x=(1, 2), y='b,c')", "d"]
    assert split_top_level(r"a(x='it\'s + \\')+b", "+") == [r"a(x='it\'s + \\')", "b"]
    assert split_top_level("", "+") == []


HOSTILE = [
    "__import__('os')", "__import__('os').system('true')", "a(x=__import__('os'))", "a(x=open('/etc/passwd'))", "a(x=().__class__)",
    "a(x=[i for i in (1,)])", "a(x=lambda: 1)", "a(x=f'{1}')", "a(x=(yield))", "a(x:=1)", "a(x=b)", "a(x=1 if True else 2)",
    "a(x=Mass(share=0.5))", "a(x=Mass())", "a(x=Mass(0.5, 0.5))", "a(x=Mass(Mass(0.5)))", "a(x=Threshold(Mass(0.5)))", "a(x=Mass('1'))",
    "a(x=Mass(0))", "a(x=Budget(0.5))", "a(1)", "a(x=1, x=2)", "a(*[1])", "a(**{'x': 1})", "a(x=1)(y=2)", "a(x=1) or (2)", "a(x=1), (2)",
    "a(x=1)#)", "a(x=1)\n#2345)", "a(x=1", "a x=1)", "a)", "a(,)", "a(x=1\x00)", "a(x='\ud800')", "", "   ", "()", "-a", "A(x=1)", "a!b",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_strings_are_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_spec(text)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


HUGE = {
    "brackets": "a(x=" + "(" * 10_000 + ")" * 10_000 + ")", "signs": "a(x=" + "-" * 100_000 + "1)", "sum": "a(x=" + "1+" * 50_000 + "1)",
    "digits": "a(x=" + "9" * 5_000 + ")", "calls": "a(x=" + "Mass(" * 190 + "1" + ")" * 190 + ")", "slug": "a" * 10**6 + "!",
    "names": "a(" + ", ".join("x=1" for _ in range(5_000)) + ")", "nots": "a(x=" + "not " * 50_000 + "1)", "open": "a(x='" + "b" * 10**6,
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_huge_input_is_refused_shortly_and_soon(name: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError) as raised:
        parse_spec(HUGE[name])
    assert len(str(raised.value)) < 400 and time.process_time() - began < 2


@settings(max_examples=100, deadline=None)
@given(st.text("ab(),='\"\\#[]{}+-*.:1 \nMass", max_size=30))
def test_whatever_is_given_is_read_or_refused(text: str) -> None:
    try:
        slug, found = parse_spec(f"a({text}")
    except ValueError:
        return
    assert slug == "a" and parse_spec(format_spec(slug, found)) == (slug, found)


def test_only_strings_are_specs() -> None:
    with pytest.raises(TypeError, match="not by dict"):
        parse_spec({"a": 1})  # pyright: ignore[reportArgumentType]
