"""The shipped text, and text of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from saccade.evaluate.collect import collect
from saccade.evaluate.text import SHIPPED, grammar, read_text, shipped_text, words


def test_the_shipped_text_is_a_megabyte_of_plain_ascii() -> None:
    text = shipped_text()
    assert 900_000 < len(text) < 1_100_000
    assert max(text) < 127
    assert max(map(len, text.split(b"\n"))) <= 120, "needles go to line breaks, so lines must be short"
    for place in (b"/root/", b"/home/", b"site-packages/saccade"):
        assert place not in text


def test_the_shipped_text_names_its_licence_and_origin() -> None:
    notice = (SHIPPED.parent / "LICENSE.stdlib.txt").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in notice
    assert "CPython 3.11.7" in notice


def test_words_are_distinct_and_of_the_grammar() -> None:
    found = words("def alpha(beta): the Gamma gamma_x delta1 abcdefghijk beta naïve plain".encode())
    assert found == ["alpha", "beta", "plain"]
    assert len(words(shipped_text())) > 3000


def test_collecting_takes_every_third_eligible_module_by_name(tmp_path: Path) -> None:
    def body(name: str) -> bytes:
        return f"# {name}\n".encode() * 400

    for name in ("a", "b", "c", "d", "e"):
        (tmp_path / f"{name}.py").write_bytes(body(name))
    (tmp_path / "_private.py").write_bytes(body("_private"))
    (tmp_path / "aa_short.py").write_bytes(b"x = 1\n")
    (tmp_path / "ab_accents.py").write_bytes("# é\n".encode() * 800)
    (tmp_path / "ac_wide.py").write_bytes(b"#" * 2000)
    assert collect(tmp_path) == body("a") + b"\n\n" + body("d")
    assert collect(tmp_path, limit=1) == body("a")
    with pytest.raises(ValueError, match="no plain ASCII Python module"):
        collect(tmp_path / "nothing")


def test_a_file_of_the_users_becomes_a_grammar(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("the quick brown foxes jumped\n" * 300)
    found = grammar(path)
    assert found.text == path.read_bytes()
    # five words are too few for keys that differ, so the shipped words serve
    assert found.words == grammar().words


@pytest.mark.parametrize(("content", "says"), [(None, "does not exist"), (b"short", "has 5 bytes"), (b"\xff" * 5000, "is not UTF-8")])
def test_a_bad_file_is_refused_in_a_sentence(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_text(path)
