from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest

from saccade.catalog import FAMILIES, KINDS, Row, catalog, find, nearest, read_rows

ROOT = Path(__file__).resolve().parents[1]
PAPERS_BY_FAMILY = {
    "adapt": 8, "analysis": 21, "cache": 15, "decode": 18, "diffusion": 14, "exact": 7, "heads": 16, "hybrid": 16,
    "kvcomp": 7, "linear": 28, "lowbit": 16, "prefill": 12, "score": 19, "sparse": 18, "static": 9, "systems": 8,
    "vision": 18,
}
GOOD = {
    "slug": "one", "title": "One", "arxiv": "2404.14469", "family": "cache", "kind": "cache", "claim": "Works.",
    "status": "planned", "module": "", "evidence": "",
}

papers = [row for row in catalog().values() if row.family != "baseline"]
done = [row for row in catalog().values() if row.done]


def test_every_paper_stands_once():
    assert len(papers) == 250 == sum(PAPERS_BY_FAMILY.values())
    assert Counter(row.family for row in papers) == PAPERS_BY_FAMILY
    assert set(FAMILIES) == {*PAPERS_BY_FAMILY, "baseline"}
    assert {row.kind for row in papers} == set(KINDS)
    assert [row.slug for row in catalog().values() if row.family == "baseline"] == ["dense", "random", "random-tiles", "softmax"]


def test_titles_ids_and_claims_are_each_paper_s_own():
    for name in ("title", "arxiv", "claim"):
        repeated = [value for value, count in Counter(getattr(row, name) for row in papers).items() if count > 1]
        assert not repeated, name


@pytest.mark.parametrize("row", catalog().values(), ids=lambda row: row.slug)
def test_claims_are_whole_sentences(row: Row):
    assert row.claim == " ".join(row.claim.split()) and row.claim.isascii()
    assert row.claim[0].isupper() or row.claim[0].isdigit()
    assert row.claim.endswith(".") and not row.claim.endswith("..")
    assert row.claim.count("(") == row.claim.count(")")


def test_a_row_knows_its_link():
    assert find("snapkv").url == "https://arxiv.org/abs/2404.14469"
    assert find("dense").url == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "caches"}, "family 'caches' of 'one' is unknown: use one of adapt, "),
        ({"kind": "thing"}, "kind 'thing' of 'one' is unknown"),
        ({"status": "soon"}, "status 'soon' of 'one' is unknown: use one of planned, done"),
        ({"arxiv": "cs/0601001"}, "is not an id"),
        ({"slug": "One Two"}, "'One Two' is not a slug"),
        ({"claim": ""}, "needs a title and a claim"),
        ({"claim": "x" * 161}, "needs a title and a claim of 1 to 160 characters"),
        ({"status": "done"}, "'one' is marked done: name its module and its evidence"),
        ({"status": "done", "module": "saccade.methods.x", "evidence": "tests/x.py"}, "marked done"),
        ({"title": 3}, "title of 'one' in the catalogue is 3: write a string"),
        ({"colour": "red"}, "has the unknown key 'colour'"),
    ],
)
def test_a_wrong_row_is_refused_in_one_sentence(change: dict, message: str):
    with pytest.raises(ValueError) as caught:
        read_rows({"paper": [GOOD | change]})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_twice_a_missing_key_and_an_unknown_table_are_refused():
    with pytest.raises(ValueError, match="'one' twice"):
        read_rows({"paper": [GOOD], "baseline": [GOOD]})
    with pytest.raises(ValueError, match="lacks title, kind"):
        read_rows({"paper": [{key: value for key, value in GOOD.items() if key not in ("title", "kind")}]})
    with pytest.raises(ValueError, match="table 'papers'"):
        read_rows({"papers": [GOOD]})


def test_the_nearest_names_come_first():
    assert nearest("snapvk")[0] == "snapkv"
    assert nearest("Streaming_LLM") == ["streaming-llm"]
    assert "grouped-differential-attention" in nearest("differential")
    assert nearest("qqqqqqqq") == []
    with pytest.raises(ValueError, match=r"no method or paper called 'snap-kv': did you mean snapkv"):
        find("snap-kv")
    with pytest.raises(ValueError, match="`saccade list` shows all names"):
        find("qqqqqqqq")


def test_reading_the_catalogue_imports_no_torch():
    code = "import sys; from saccade.catalog import catalog; catalog(); print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


@pytest.mark.parametrize("row", done, ids=lambda row: row.slug)
def test_what_is_done_is_registered_by_its_module(row: Row):
    from saccade.core import REGISTRY

    import_module(row.module)
    assert REGISTRY[row.slug].__module__ == row.module
    assert REGISTRY[row.slug].info.slug == row.slug


@pytest.mark.parametrize("row", done, ids=lambda row: row.slug)
def test_what_is_done_names_a_test_that_exists(row: Row):
    path, *names = row.evidence.split("::")
    body = ast.parse((ROOT / path).read_text("utf-8")).body
    for name in names:
        name = name.partition("[")[0]
        found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
        assert found, f"{path} defines no {name}"
        body = found[0].body


def test_every_registered_method_has_its_row():
    from saccade import methods
    from saccade.core import REGISTRY

    for module in walk_packages(methods.__path__, f"{methods.__name__}."):
        import_module(module.name)
    ours = {slug: cls.__module__ for slug, cls in REGISTRY.items() if cls.__module__.startswith(methods.__name__)}
    assert ours == {row.slug: row.module for row in done}
