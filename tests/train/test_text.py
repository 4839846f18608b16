"""The grammar's sentences are fixed: the shipped model knows exactly these."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.train import text as t
from saccade.train.text import Grammar


def test_sentences():
    assert t.needle_sentence("secret code", "red-fox", "123") == "\nThe secret code for red-fox is 123.\n"
    assert t.needle_question("secret code", "red-fox") == (
        "\nQuestion: What is the secret code for red-fox?\nAnswer: The secret code for red-fox is "
    )
    assert t.dictionary_line("red", "12") == '"red": "12",\n'
    assert t.dictionary_question("red") == 'd["red"] == "'
    assert t.variable_sentence("ABCD", "54321") == "\nVAR ABCD = 54321\n"
    assert t.variable_copy("EFGH", "ABCD") == "\nVAR EFGH = VAR ABCD\n"
    assert t.variable_question("EFGH") == "\nQuestion: which value does VAR EFGH hold?\nAnswer: "
    assert (t.copy_open, t.copy_close) == (b"<<", b">>\n")
    assert t.NOUNS == ("magic number", "secret code", "special value", "access token")


def test_values_keys_and_names(grammar: Grammar):
    rng = Random(0)
    values = [grammar.value(rng) for _ in range(2000)]
    shapes = (r"[1-9]\d{4,8}", r"[0-9a-f]{8}|[0-9a-f]{12}", r"[a-z]{4,9} [a-z]{4,9}")
    assert all(any(re.fullmatch(shape, value) for shape in shapes) for value in values)
    assert 0.15 < sum(" " in value for value in values) / 2000 < 0.25
    keys = [grammar.key(rng) for _ in range(2000)]
    assert all(set(key.split("-")) <= set(grammar.words) for key in keys)
    assert 0.2 < sum("-" not in key for key in keys) / 2000 < 0.3
    assert re.fullmatch("[A-HJ-NP-Z]{4}", grammar.name(rng)) and re.fullmatch(r"\d{5}", grammar.number(rng))


def test_haystack_is_a_cut_of_the_text(grammar: Grammar):
    cut = grammar.haystack(Random(2), 500)
    assert len(cut) == 500 and cut in grammar.text
    assert cut == grammar.haystack(Random(2), 500) != grammar.haystack(Random(3), 500)


def test_insert_at_lines():
    haystack = b"one\ntwo\nthree"
    assert t.insert_at_lines(haystack, [(0.0, b"A")]) == b"oneA\ntwo\nthree"
    assert t.insert_at_lines(haystack, [(0.3, b"A")]) == b"oneA\ntwo\nthree"
    assert t.insert_at_lines(haystack, [(0.9, b"B"), (0.4, b"A")]) == b"one\ntwoA\nthreeB"
    assert t.insert_at_lines(haystack, [(0.4, b"A"), (0.4, b"B")]) == b"one\ntwoAB\nthree"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([b"[A]", b"[B]"])), max_size=6), st.binary(max_size=80))
def test_insertion_keeps_every_byte(pieces: list[tuple[float, bytes]], haystack: bytes):
    haystack = haystack.replace(b"[", b"")
    out = t.insert_at_lines(haystack, pieces)
    assert re.sub(rb"\[[AB]\]", b"", out) == haystack
    assert re.findall(rb"\[[AB]\]", out) == [piece for _, piece in sorted(pieces, key=lambda pair: pair[0])]


def test_errors(grammar: Grammar):
    with pytest.raises(ValueError, match="expected a share"):
        t.insert_at_lines(b"a\nb", [(1.5, b"")])
    with pytest.raises(ValueError, match="longer text"):
        grammar.haystack(Random(0), len(grammar.text))
    with pytest.raises(ValueError, match="0 words"):
        Grammar(b"text", [])
