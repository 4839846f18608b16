"""The benchmark page: whole, self-contained, safe whatever the names hold, and alive in a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saccade.bench import result as bench_result
from saccade.bench.growth import growth
from saccade.report.bench_page import findings, render_page, write_page

HOSTILE = "<script>alert(1)</script>&\"'</style>{{ 7*7 }}"
VOID = {"meta", "input", "br", "wbr", "img", "link", "hr"}


class Reader(HTMLParser):
    """Tags with attributes, the text outside scripts and styles, and the nesting."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and tag != "path":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)


def row(family: str, n: int, name: str, role: str, ms: float | None, density: float, **more: Any) -> dict[str, Any]:
    flops, moved = 4.0 * 32 * 128 * n * n / 2 * density, 4.0 * 32 * n * 128 * 2
    case: dict[str, Any] = {"n": n, "batch": 1, "heads": 32, "kv_heads": 8, "dim": 128}
    if family == "tiles":
        case["density"] = more.pop("asked", density)
    fields: dict[str, Any] = {
        "status": "ok", "impl": "triton", "flops": flops, "bytes": moved, "work": flops, "unit": "FLOP", "rate_unit": "TFLOP/s",
        "intensity": flops / moved, "density": density, "first_call_ms": 900.0, "repeats": 20, **more,
    }  # fmt: skip
    if ms is not None:
        fields |= {"ms": ms, "ms_low": 0.98 * ms, "ms_high": 1.03 * ms, "rate": flops / ms / 1e9, "tflops": flops / ms / 1e9}
    return bench_result.row(op="attend", family=family, case=case, contestant=name, role=role, **fields)


def made_up() -> dict[str, Any]:
    """A lifelike result of attend."""
    rows = []
    for n in (2048, 8192, 32768):
        whole = 4 * 32 * 128 * n * n / 2 / 580e9
        rows += [
            row("dense forward", n, "saccade", "ours", whole * 1.05, 1.0, ratio=0.95, error=1e-3, allowed=3e-3, ok=True, peak_bytes=2**28),
            row("dense forward", n, "cuDNN", "dense", whole, 1.0, ratio=1.0, error=1e-3, allowed=3e-3, ok=True),
            row("dense forward", n, "FlashAttention-2", "dense", whole * 1.7, 1.0, ratio=0.59),
        ]
    for density in (0.5, 0.1, 0.05):
        rows += [
            row("tiles", 32768, "saccade", "ours", whole * density * 1.2, density, ratio=1 / density / 1.2, ratio_peer=1.3, error=1e-3,
                allowed=3e-3, ok=True),
            row("tiles", 32768, "cuDNN", "dense", whole, 1.0, ratio=1.0, asked=density),
            row("tiles", 32768, "FlexAttention", "peer", whole * density * 1.6, density, ratio=1 / density / 1.6, ratio_peer=1.0),
        ]  # fmt: skip
    rows.append(row("tiles", 131072, "saccade", "ours", None, 0.1, status="skipped", note="out of memory"))
    rows.append(row("single tokens", 8192, "saccade", "ours", None, 0.1, status="failed", note="RuntimeError: illegal access"))
    return {
        **bench_result.new_defaults(), "schema": bench_result.SCHEMA, "op": "attend", "grid": "quick",
        "created": "2026-01-02T03:04:05+00:00", "command": "saccade bench attend --grid quick",
        "environment": {"device_name": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0"},
        "settings": {"dtype": "bfloat16", "impl": "auto"}, "ceilings": {"copy": 4.3, "matmul": 694.0},
        "libraries": {"fla": "fla is not installed: pip install flash-linear-attention", "flash_attn": "2.8"}, "rows": rows,
        "growth": growth(rows),
    }  # fmt: skip


def test_the_page_is_whole_and_asks_the_network_for_nothing() -> None:
    page = render_page(made_up())
    reader = Reader(page)
    text = " ".join(" ".join(reader.text).split())
    assert reader.open == [] and page.startswith("<!doctype html>")
    for words in ("attend on NVIDIA H200", "copy 4.3 TB/s, matmul 694 TFLOP/s", "tiles", "FlexAttention", "0.95\u00d7", "failed",
                  "out of memory", "pip install flash-linear-attention", "saccade bench attend --grid quick", "Speed-up against density",
                  "Time against length", "Roofline", "2.00", "256 MiB"):  # fmt: skip
        assert words in text, words
    links = [value for _, attributes in reader.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(link.startswith("#") for link in links)
    assert "https://" not in re.sub(r'(?s)<script type="text/plain".*?</script>', "", page)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    rows = [attributes for tag, attributes in reader.tags if tag == "tr" and "data-method" in attributes]
    assert len(rows) == len(made_up()["rows"]) and sum(a.get("class") == "failed" for a in rows) == 1


def test_names_are_text_whatever_they_hold() -> None:
    result = made_up()
    result["command"] = result["environment"]["device_name"] = HOSTILE
    for made in result["rows"][:2]:
        made |= {"family": HOSTILE, "contestant": HOSTILE, "note": HOSTILE, "impl": HOSTILE}
    page = render_page(result)
    assert "<script>alert" not in page and "49" not in "".join(Reader(page).text).replace("0.49", "")[:400]
    assert HOSTILE in "".join(Reader(page).text)


def test_what_was_not_measured_has_no_chart(tmp_path: Path) -> None:
    result = made_up()
    result["rows"] = result["rows"][:2]
    result["rows"][0] |= {"flops": None, "intensity": None, "tflops": None}
    result["rows"][1] |= {"flops": None, "intensity": None, "tflops": None}
    page = Reader(render_page(result))
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert not ids & {"density", "length", "roofline"} and "rows" in ids
    path = write_page(result, tmp_path / "x.html")
    assert path.read_text() and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="has schema"):
        render_page({**result, "schema": "saccade.compare/1"})


def test_findings_say_how_it_stands() -> None:
    result = made_up()
    found = dict((text.split(":")[0], kind) for kind, text in findings(result))
    assert found["Best against dense"] == "good" and found["Worst against dense"] == "note"
    told = " ".join(text for _, text in findings(result))
    assert "16.67 times as fast" in told and "All 6 checked results" in told and "illegal access" in told and "1 row was skipped" in told
    result["rows"][0]["ok"] = False
    assert any(kind == "bad" and "further off than allowed" in text for kind, text in findings(result))


@pytest.fixture(scope="module")
def opened(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_page(made_up(), tmp_path_factory.mktemp("page") / "page.html")
    contexts = []

    def open_page(**options: Any) -> SimpleNamespace:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, "color_scheme": "light", **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        seen = SimpleNamespace(page=page, complaints=[], requests=[], url=path.as_uri())
        page.on("console", lambda message: seen.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.goto(seen.url)
        for part in ("density", "length", "roofline"):
            page.evaluate("id => document.getElementById(id).scrollIntoView()", part)
            page.wait_for_selector(f"#{part} .point", state="attached")
        return seen

    yield open_page
    for context in contexts:
        context.close()


def test_charts_and_table_in_a_browser(opened: Any) -> None:
    seen = opened()
    page = seen.page
    assert page.locator("#density-chart .scatterlayer .trace").count() == 3, "the ideal, saccade and FlexAttention"
    assert page.locator("#length-chart .scatterlayer .trace").count() == 3
    assert page.locator("#roofline-chart .scatterlayer .trace").count() == 5
    shown = "#table tbody tr:not([hidden])"
    total = page.locator(shown).count()
    page.click('[data-chip="FlexAttention"]')
    assert page.locator(shown).count() == 3
    page.click("#clear")
    page.select_option("select[name=task]", "tiles")
    assert page.locator(shown).count() == 10 < total
    page.select_option("select[name=status]", "skipped")
    assert page.locator(shown).count() == 1 and "out of memory" in page.locator(shown).inner_text()
    page.select_option("select[name=task]", "")
    page.select_option("select[name=status]", "")
    page.fill("input[name=find]", "illegal")
    assert page.locator(shown).count() == 1
    page.fill("input[name=find]", "")
    page.click('#table th[data-column="3"] button')
    times = page.eval_on_selector_all(shown, "rows => rows.map(row => JSON.parse(row.dataset.sort)[3])")
    known = [value for value in times if value is not None]
    assert known == sorted(known, reverse=True) and times[len(known) :] == [None, None]
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    assert seen.complaints == [] and set(seen.requests) == {seen.url}


@pytest.mark.slow
def test_a_phone_in_the_dark(opened: Any) -> None:
    seen = opened(viewport={"width": 360, "height": 740}, color_scheme="dark", is_mobile=True, has_touch=True)
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 360
    widest = "Math.max(...[...document.querySelectorAll('.chart svg')].map(node => node.getBoundingClientRect().right))"
    assert 300 < seen.page.evaluate(widest) <= 360
    assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert seen.complaints == []
