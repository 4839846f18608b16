"""The page as a file: whole, self-contained, small, and safe whatever the names hold."""

from __future__ import annotations

import base64
import os
import re
import sys
from html.parser import HTMLParser

import pytest

from saccade.report import comparison, render_page, write_page
from saccade.report.palette import contrast

HOSTILE = "<script>alert(1)</script>&\"'</style>{{ 7*7 }}"
VOID = {"meta", "input", "br", "wbr", "img", "link", "hr"}


class Reader(HTMLParser):
    """What a browser would see: tags with attributes, the text outside scripts and styles, the nesting."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_fixture_file_is_what_the_maker_makes(small_result, small_maker):
    made = small_maker()
    assert {**small_result, "attention": None} == {**made, "attention": None}
    # Rounded maps may differ by a step between processors: only their shape is compared.
    for ours, theirs in zip(small_result["attention"]["layers"], made["attention"]["layers"], strict=True):
        for one, other in zip(ours["heads"], theirs["heads"], strict=True):
            assert one["selections"].keys() == other["selections"].keys()
            assert len(base64.b64decode(one["map"])) == one["size"] ** 2


def test_the_page_is_whole_and_asks_the_network_for_nothing(small_result):
    reader = Reader(render_page(small_result))
    assert reader.open == []
    for _, attributes in reader.tags:
        assert not {"src", "href", "srcset", "action", "poster"} & attributes.keys() or attributes["href"].startswith(
            "#"
        )
    assert not reader.of("link") and not reader.of("img") and not reader.of("iframe")
    policy = next(a["content"] for a in reader.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "http" not in policy
    styles = re.findall(r"<style>(.*?)</style>", render_page(small_result), re.S)
    assert "@import" not in styles[0] and "url(" not in styles[0]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_in_both_themes(theme, small_result):
    block = render_page(small_result).split(f"color-scheme: {theme};")[1].split("}")[0]
    colour = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
    for paper in ("page", "panel", "soft"):
        for ink in ("ink", "muted", "accent", "bad"):
            assert contrast(colour[ink], colour[paper]) >= 4.5, (ink, paper)
    assert contrast(colour["on-accent"], colour["accent"]) >= 4.5
    assert contrast(colour["bad"], colour["bad-soft"]) >= 4.5
    assert contrast(colour["look-random"], colour["panel"]) >= 3.0


def test_sections_come_in_order(small_result):
    ids = [a["id"] for a in Reader(render_page(small_result)).of("section")]
    assert ids == ["summary", "quality", "depth", "tasks", "rows", "attention", "fidelity", "notes"]


def test_every_row_carries_its_command_and_every_failure_its_sentence(small_result):
    reader = Reader(render_page(small_result))
    copied = [a["data-copy"] for a in reader.of("button") if "data-copy" in a]
    assert copied == [small_result["command"], *(row["command"] for row in small_result["rows"])]
    failed = [row for row in small_result["rows"] if row["status"] == "failed"]
    assert failed and all(row["error"] in reader.text for row in failed)


def test_hostile_names_stay_text(make_result, fake):
    methods = [fake("dense"), fake(HOSTILE)]
    made = make_result(methods=methods, tasks=("needle", HOSTILE), lengths=(1024,), layers=(0,), heads=1, size=8)
    made["rows"][0]["error"] = HOSTILE
    made["rows"][-1] |= {"status": "failed", "error": HOSTILE}
    made["model"]["name"] = made["settings"]["note"] = made["command"] = made["attention"]["prompt"] = HOSTILE
    page = render_page(made)
    reader = Reader(page)
    assert "<script>alert" not in page
    assert reader.open == []
    plain = Reader(render_page(make_result(methods=[fake("dense"), fake("b")], tasks=("needle", "c"), lengths=(1024,))))
    assert len(reader.of("style")) == len(plain.of("style"))
    assert len(reader.of("script")) == len(plain.of("script")) + 1  # the one layer of attention
    assert HOSTILE in reader.text
    assert HOSTILE in [a.get("data-chip") for a in reader.of("button")]


def test_a_result_with_the_least_in_it_is_a_page():
    row = {"method": "dense", "task": "needle", "length": 7, "status": "failed"}
    reader = Reader(render_page({"schema": "saccade.compare/1", "rows": [row]}))
    assert "No reason was recorded." in reader.text and reader.open == []


def test_several_modes_can_be_chosen(make_result, fake):
    made = make_result(
        methods=[fake("dense"), fake("a")], tasks=("needle",), lengths=(1024,), modes=("aware", "agnostic")
    )
    values = [a["value"] for a in Reader(render_page(made)).of("input") if a.get("name") == "Mode"]
    assert values == ["aware", "agnostic"]


def test_pages_fit_their_limits(small_result, large_result):
    small, large = (len(render_page(result).encode()) for result in (small_result, large_result))
    assert small < 6e6
    assert large < 8e6
    kept = sum(len(h["selections"]) for layer in large_result["attention"]["layers"] for h in layer["heads"])
    assert (kept, len(large_result["rows"])) == (8 * 6 * 11, 12 * 6 * 4)


def test_the_same_result_gives_the_same_page(small_result):
    assert render_page(small_result) == render_page(small_result)


def test_write_page_writes_at_once_or_not_at_all(small_result, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    assert write_page(small_result, path) == path
    assert path.read_text(encoding="utf-8") == render_page(small_result)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_page(small_result, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["page.html"]


def test_what_can_not_be_written_or_read_is_told_in_one_sentence(small_result, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        write_page(small_result, tmp_path / "nowhere" / "page.html")
    with pytest.raises(ValueError, match=r"has schema 'saccade\.compare/9'"):
        write_page(small_result | {"schema": "saccade.compare/9"}, tmp_path / "page.html")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("missing", ["jinja2", "plotly.offline"])
def test_a_missing_library_names_the_extra(missing, small_result, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    comparison.pack.plotly_script.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'saccade\[report\]'"):
        render_page(small_result)
