"""The page of every head: whole, self-contained, safe whatever the names hold, and alive in a browser."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.evaluate.conftest import Near
from tests.evaluate.tiny import tiny
from tests.report.test_bench_page import HOSTILE, Reader

from saccade.core import REGISTRY
from saccade.evaluate.inspect import inspect, needle_prompt
from saccade.report.inspect_page import findings, mass_source, render_page, scored, write_page

SPEC = "test-near(size=24)"
SHOWN = "#table tbody tr:not([hidden])"


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """A result of the tiny model: 2 layers of 4 heads, 300 tokens, with scores that tell the heads apart."""
    model, tokenizer = tiny()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, "test-near", Near)
        ids = needle_prompt(tokenizer, 300)
        result = inspect(model, tokenizer, ids, prefill=SPEC, name="tiny", source="needle", command="saccade inspect --x")
    for at, layer in enumerate(result["attention"]["layers"]):
        for head in layer["heads"]:
            number = 4 * at + head["head"]
            head |= {"sink": number / 10, "retrieval": (number * 3 % 8) / 10}
    return result


def without(result: dict[str, Any]) -> dict[str, Any]:
    """The same without a method, and with no n-gram that repeats."""
    bare = copy.deepcopy(result)
    bare["settings"]["prefill"] = None
    for layer in bare["attention"]["layers"]:
        layer |= {"density": None, "mass_from": None}
        for head in layer["heads"]:
            head |= {"selections": {}, "mass": {}, "density": {}, "retrieval": None}
    return bare


def test_the_page_is_whole_and_asks_the_network_for_nothing(made: dict[str, Any]) -> None:
    page = render_page(made)
    reader = Reader(page)
    text = " ".join(" ".join(reader.text).split())
    assert reader.open == [] and page.startswith("<!doctype html>")
    for words in ("8 heads of tiny on 300 tokens", SPEC, "saccade inspect --x", "Exact: from all rows.", "Layer 1, head 3", "Retrieval"):
        assert words in text, words
    links = [value for _, attributes in reader.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(link.startswith("#") for link in links) and "https://" not in page
    assert "plotly" not in page.split("<script")[0], "no charts, so no plotly"
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and {"attention-0", "attention-1"} <= set(ids)
    assert len(page) < 250_000
    rows = [attributes for tag, attributes in reader.tags if tag == "tr" and "data-at" in attributes]
    assert [(row["data-at"], row["data-head"]) for row in rows] == [(str(layer), str(head)) for layer in range(2) for head in range(4)]


def test_all_pages_share_their_colours(made: dict[str, Any]) -> None:
    templates = Path(__import__("saccade.report.inspect_page", fromlist=["x"]).__file__).parent / "templates"
    for name in ("page.html", "bench.html", "inspect.html"):
        text = (templates / name).read_text()
        assert '{% include "colours.html" %}' in text and "--panel:" not in text, name
    assert re.search(r":root\[data-theme=\"dark\"\] \{ color-scheme: dark; --page: #14171a", render_page(made))


def test_names_are_text_whatever_they_hold(made: dict[str, Any]) -> None:
    hostile = copy.deepcopy(made)
    hostile["command"] = hostile["model"]["name"] = hostile["settings"]["prompt"] = HOSTILE
    hostile["notes"] = [HOSTILE]
    hostile["attention"] |= {"prompt": HOSTILE, "texts": [HOSTILE] * 150}
    page = render_page(hostile)
    assert "<script>alert" not in page
    assert HOSTILE in "".join(Reader(page).text)


def test_findings_say_what_stands_out(made: dict[str, Any]) -> None:
    heads = scored(made["attention"]["layers"], SPEC)
    retrieve, sink, read = findings(heads, SPEC)
    assert "7 of 8 heads retrieve" in retrieve[1] and "layer 1, head 1 (0.70)" in retrieve[1]
    assert "5 of 8 heads rest on the first tokens" in sink[1] and "layer 1, head 3 (0.70)" in sink[1]
    assert SPEC in read[1] and "least in layer" in read[1]
    bare = scored(without(made)["attention"]["layers"], None)
    told = [text for _, text in findings(bare, None)]
    assert len(told) == 2 and "no n-gram of this prompt comes twice" in told[0]


def test_where_the_mass_comes_from_is_said(made: dict[str, Any]) -> None:
    result = copy.deepcopy(made)
    result["settings"]["rows"] = 64
    assert mass_source(result).startswith("From 64 rows a layer")
    for layer in result["attention"]["layers"]:
        layer["mass_from"] = "tiles"
    assert mass_source(result).startswith("Exact: the selection is made of whole tiles")
    result["attention"]["layers"][0]["mass_from"] = "rows"
    assert mass_source(result).startswith("In layers whose selection is made of whole tiles")


def test_what_is_no_inspection_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="is a dict, as read from its JSON file, not list"):
        render_page([])
    with pytest.raises(ValueError, match=r"has schema 'saccade\.compare/1'"):
        render_page({**made, "schema": "saccade.compare/1"})
    with pytest.raises(ValueError, match="holds no heads"):
        render_page({**made, "attention": {"layers": []}})
    path = write_page(made, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="does not exist"):
        write_page(made, tmp_path / "nowhere" / "page.html")


@pytest.fixture(scope="module")
def visit(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    contexts = []

    def open_page(result: dict[str, Any], **options: Any) -> SimpleNamespace:
        path = write_page(result, tmp_path_factory.mktemp("page") / "page.html")
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, "color_scheme": "light", **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        seen = SimpleNamespace(page=page, complaints=[], requests=[], url=path.as_uri())
        page.on("console", lambda message: seen.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.goto(seen.url)
        page.wait_for_selector("#heads canvas")
        page.wait_for_function("() => document.querySelector('#heads canvas').width === 150")
        return seen

    yield open_page
    for context in contexts:
        context.close()


PIXELS = """canvas => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let sum = 0;
  for (let i = 0; i < data.length; i += 4) sum += data[i] + 2 * data[i + 1] + 3 * data[i + 2];
  return sum;
}"""


@pytest.mark.slow
def test_heads_are_sorted_filtered_enlarged_and_saved(made: dict[str, Any], visit: Any, tmp_path: Path) -> None:
    seen = visit(made)
    page = seen.page

    def names() -> list[str]:
        return page.eval_on_selector_all("#heads .head strong", "nodes => nodes.map((node) => node.textContent)")

    def rows() -> list[str]:
        return page.eval_on_selector_all(f"{SHOWN} th", "nodes => nodes.map((node) => node.textContent)")

    in_order = [f"Layer {layer}, head {head}" for layer in range(2) for head in range(4)]
    by_sink = in_order[::-1]
    assert names() == rows() == in_order
    page.select_option("#order", "3")
    assert names() == rows() == by_sink
    page.click('#table th[data-column="3"] button')
    assert names() == in_order, "a second click turns it around"
    page.click('#table th[data-column="4"] button')
    assert page.input_value("#order") == "4" and names()[0] == "Layer 1, head 1"
    page.fill('input[data-column="3"]', "0.4")
    assert sorted(names()) == in_order[4:] and "4 of 8 heads" in page.inner_text("#count")
    page.select_option('select[name="layer"]', "0")
    assert names() == [] and page.inner_text("#attention-note") == "No head passes the filter."
    page.click('button[type="reset"]')
    page.wait_for_function("() => document.querySelectorAll('#heads .head').length === 8")
    assert names() == in_order

    first = page.locator("#heads canvas").first
    kept = first.evaluate(PIXELS)
    page.check('input[name="Overlay"][value="missed"]')
    page.wait_for_function(f"before => ({PIXELS})(document.querySelector('#heads canvas')) !== before", arg=kept)
    page.check('input[name="Overlay"][value="kept"]')
    page.wait_for_function(f"before => ({PIXELS})(document.querySelector('#heads canvas')) === before", arg=kept)

    page.select_option("#order", "3")
    page.locator(f"{SHOWN} button[data-enlarge]").nth(1).click()
    assert page.inner_text("#enlarged-title") == "Layer 1, head 2, group 1"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#enlarged-title") == "Layer 1, head 1, group 0", "the next one of the list as it is sorted"
    page.hover("#enlarged-map", position={"x": 4, "y": 300})
    page.wait_for_function("() => document.querySelector('#enlarged-read').textContent.startsWith('Queries')")
    assert "\u201c" in page.inner_text("#enlarged-read") and "mean mass" in page.inner_text("#enlarged-read")
    with page.expect_download() as download:
        page.click("#save-head")
    assert download.value.suggested_filename == "saccade-inspect-tiny-layer-1-head-1-group-0.png"
    sizes = [png_size(download.value, tmp_path / "head.png")]
    page.keyboard.press("Escape")
    page.fill('input[data-column="3"]', "0.2")
    with page.expect_download() as download:
        page.click("#save-page")
    assert download.value.suggested_filename == "saccade-inspect-tiny-heads.png"
    sizes.append(png_size(download.value, tmp_path / "sheet.png"))
    assert sizes[0][0] == 6 * 150 + 2 * 14 and sizes[1][0] == 3 * (256 + 14) + 14, "6 heads in 3 columns"
    assert seen.complaints == [] and set(seen.requests) == {seen.url} | {url for url in seen.requests if url.startswith("blob:")}


def png_size(download: Any, path: Path) -> tuple[int, int]:
    download.save_as(path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_a_phone_in_the_dark_without_a_method(made: dict[str, Any], visit: Any) -> None:
    seen = visit(without(made), viewport={"width": 360, "height": 740}, color_scheme="dark", is_mobile=True, has_touch=True)
    page = seen.page
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert page.locator('input[name="Overlay"]').count() == 0 and page.locator('input[data-column="5"]').count() == 0
    page.fill('input[data-column="4"]', "0")
    assert page.locator(SHOWN).count() == 0, "no head has a retrieval score"
    page.fill('input[data-column="4"]', "")
    page.locator("#heads .head").first.click()
    assert page.inner_text("#enlarged-title").startswith("Layer 0, head 0")
    assert page.locator("#enlarged-overlay:visible").count() == 0 and page.evaluate("document.documentElement.scrollWidth") == 360
    assert seen.complaints == []
