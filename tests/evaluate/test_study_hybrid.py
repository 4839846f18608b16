"""The study of hybrids: which models the ratios come to, that all are trained alike, what a toy run leaves and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saccade.evaluate.study import shrunk
from saccade.evaluate.study_hybrid import (
    KINDS,
    RATIOS,
    HybridSettings,
    contestants,
    full_layers,
    full_places,
    recipes_for,
    run_hybrid_study,
    tables,
    write_hybrid_page,
)  # fmt: skip
from saccade.methods.hybrid.hybrid_linear_analysis import Cell
from saccade.models.decoder import schedule

TOY = HybridSettings(
    depth=4, dim=16, heads=2, length=32, pairs=2, vocab=16, steps=4, text_steps=3, batch=2, samples=1, evaluations=2, held_out=0.001,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_ratios_at_small_depths() -> None:
    assert [full_layers(ratio, 12) for ratio in RATIOS] == [0, 1, 1, 2, 3, 6]
    assert [full_layers(ratio, 24) for ratio in RATIOS] == [0, 1, 2, 3, 6, 12]
    assert full_places(1, 12) == {11} and full_places(2, 12) == {5, 11} and full_places(0, 12) == set()
    for ratio, depth in (("3:1", 12), ("1:1", 12), ("6:1", 14), ("3:1", 24)):  # where they fit, the paper's
        placed = schedule(ratio, depth, Cell(kind="gla", pattern=ratio).spec)
        assert {i for i, spec in enumerate(placed) if spec == "softmax"} == full_places(full_layers(ratio, depth), depth)


def test_every_model_stands_once() -> None:
    chosen = contestants(KINDS, RATIOS, 12)
    assert len(chosen) == 1 + 6 * 5 and len({one.key for one in chosen}) == len(chosen)
    assert chosen[0].layers(12) == ["softmax"] * 12
    both = next(one for one in chosen if one.mixer == "gla" and one.full == 1)
    assert both.ratios == ("24:1", "12:1") and both.layers(12).count("softmax") == 1 and "gla" in both.layers(12)[0]
    with pytest.raises(ValueError, match="'gal' is not one of hgrn"):
        contestants(["gal"], RATIOS, 12)
    with pytest.raises(ValueError, match="'3:2' is not 'pure' or a ratio"):
        contestants(["gla"], ["3:2"], 12)
    with pytest.raises(ValueError, match="no contestants"):
        contestants([], RATIOS, 12)


def test_all_are_trained_alike() -> None:
    recipes = [recipes_for(one, HybridSettings()) for one in contestants(["hgrn", "deltanet"], ["3:1"], 12)]
    for task in ("recall", "text"):
        first, *others = [made[task] for made in recipes]
        for other in others:
            same = shrunk(other, model=first.model)
            assert same == first and other.model != first.model


def test_a_toy_study_its_page_and_going_on(tmp_path: Path) -> None:
    chosen = contestants(["hgrn", "gated-deltanet"], ["pure", "3:1"], 4)
    cut = run_hybrid_study(chosen[:2], TOY, tmp_path, "cpu", "saccade study hybrid")
    assert [row["contestant"] for row in cut["rows"]] == ["softmax", "hgrn 0 of 4"] and cut["missing"] == []
    part = run_hybrid_study(chosen, TOY, tmp_path, "cpu", seconds=0)
    assert part["rows"] == cut["rows"] and len(part["missing"]) == 6 and part["missing"][0] == "gated-deltanet 0 of 4: recall"
    trained: list[str] = []
    found = run_hybrid_study(chosen, TOY, tmp_path, "cpu", progress=lambda name, row: trained.append(name))
    assert found["rows"][:2] == cut["rows"] and not [name for name in trained if name.startswith(("softmax", "hgrn 0"))]
    assert json.loads((tmp_path / "study.json").read_text()) == found and found["schema"] == "saccade.study-hybrid/1"
    for row in found["rows"]:
        assert 0 <= row["recall"]["accuracy"] <= 1 and row["recall"]["steps"] == 4 and row["text"]["steps"] == 3
        assert 5 < row["text"]["bits"] < 10 and row["cache_share"] == row["full"] / 4
    states = {row["contestant"]: row["state_numbers"] for row in found["rows"]}
    assert states["softmax"] == 0 and states["hgrn 0 of 4"] == 4 * 16 and states["gated-deltanet 1 of 4"] == 3 * 16 * 8
    recall, text = tables(found)
    assert list(recall.header) == ["mixer", "pure (0)", "3:1 (1)", "softmax (4)"]
    assert [row[0] for row in text.rows] == ["hgrn", "gated-deltanet", "softmax"]
    assert text.rows[0][3] == "" and text.rows[2][1:3] == ["", ""]
    assert text.rows[0][1] == f"{found['rows'][1]['text']['bits']:.3f}"
    page = write_hybrid_page(found, tmp_path / "study.html").read_text()
    assert "round(4 / (r + 1)) softmax layers" in page and "1 at 3" in page and "hgrn 1 of 4" in page and "<script" not in page


def test_what_does_not_fit_is_said_before_anything_is_written(tmp_path: Path) -> None:
    chosen = contestants(["gla"], ["pure"], 4)
    for settings, said in (
        (shrunk(TOY, pairs=9), "9 pairs and their queries take 36 tokens"),
        (shrunk(TOY, folder=str(tmp_path / "none")), "does not exist"),
        (shrunk(TOY, heads=3), "the contestant 'softmax' can't be built"),
    ):
        with pytest.raises(ValueError, match=said):
            run_hybrid_study(chosen, settings, tmp_path / "study", "cpu")
    assert not (tmp_path / "study").exists()
