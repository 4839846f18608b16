"""The comparison: its schema, its cells, and that nothing is lost."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluate.tiny import TOKEN_BYTES, tiny

from saccade.evaluate import cells
from saccade.evaluate.runner import Progress, compare
from saccade.evaluate.score import wilson

ROW = {
    "method": str, "slug": str, "task": str, "length": int, "mode": str, "status": str, "error": (str, type(None)),
    "note": (str, type(None)), "samples": int, "score": float, "low": float, "high": float, "unit": str,
    "discriminating": bool, "scores": list, "depths": list, "prefill_density": float, "decode_density": float,
    "kv_bytes": int, "index_bytes": int, "kv_bytes_dense": int, "peak_bytes": (int, type(None)), "prefill_ms": float,
    "decode_ms": float, "first_step_ms": float, "prefill_speedup": float, "decode_speedup": float,
    "output_error": (list, type(None)), "mass": (list, type(None)), "command": str,
}  # fmt: skip
LENGTH = 260


def small(methods: list[str], **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tasks": ["needle"], "lengths": [LENGTH], "samples": 2, "name": "tiny", "attention": False, "fidelity": False,
    }  # fmt: skip
    return compare(*tiny(), methods, **settings | changes)


def by_method(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in result["rows"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    path = tmp_path_factory.mktemp("run") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "PICTURE_LENGTH", 256)
        result = small(
            ["snapkv(budget=0.5)", "quest(budget=64, dense_layers=0)"], tasks=["needle", "text(answer=16)"], fidelity=True,
            attention=True, json_path=path, options=["--dtype", "float32"],
        )  # fmt: skip
    return result, path


def test_the_result_has_the_documented_shape(whole: tuple[dict[str, Any], Path]) -> None:
    result, path = whole
    assert json.loads(path.read_text()) == json.loads(json.dumps(result)), "the file is the result"
    assert result["schema"] == "saccade.compare/1"
    assert set(result) == {
        "schema", "created", "command", "environment", "model", "settings", "rows", "attention", "notes",
    }  # fmt: skip
    assert set(result["environment"]) == {
        "torch", "transformers", "python", "device", "device_name", "threads", "dtype",
    }  # fmt: skip
    parameters = sum(parameter.numel() for parameter in tiny()[0].parameters())
    assert result["model"] == {
        "name": "tiny", "layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 16, "parameters": parameters,
    }  # fmt: skip
    assert len(result["rows"]) == 2 * 4
    for row in result["rows"]:
        assert set(row) == set(ROW)
        for key, kind in ROW.items():
            assert isinstance(row[key], kind), key
        assert row["status"] == "ok" and row["error"] is None
        assert row["low"] <= row["score"] <= row["high"]
        assert row["unit"] == ("bits" if row["task"].startswith("text") else "accuracy")
        assert [depth for depth, _ in row["depths"]] == ([0.1, 0.3] if row["task"] == "needle" else [])


def test_ceiling_and_floor_are_rows_like_others(whole: tuple[dict[str, Any], Path]) -> None:
    rows = [row for row in whole[0]["rows"] if row["task"] == "needle"]
    assert [row["method"] for row in rows] == ["dense", "random(budget=0.5)", "snapkv(budget=0.5)", "quest(budget=64, dense_layers=0)"]
    dense, floor, snap, quest = rows
    assert (dense["prefill_density"], dense["decode_density"]) == (1.0, 1.0)
    assert (dense["prefill_speedup"], dense["decode_speedup"]) == (1.0, 1.0)
    assert dense["kv_bytes"] == LENGTH * TOKEN_BYTES
    assert dense["output_error"] is None
    assert (dense["low"], dense["high"]) == wilson(sum(dense["scores"]), 2)
    assert floor["kv_bytes"] == snap["kv_bytes"] == dense["kv_bytes"] / 2
    assert quest["index_bytes"] > 0 and quest["decode_density"] < 0.6
    for row in rows:
        assert row["kv_bytes_dense"] == dense["kv_bytes"]
        assert row["prefill_speedup"] == pytest.approx(dense["prefill_ms"] / row["prefill_ms"])
        assert row["decode_speedup"] == pytest.approx(dense["decode_ms"] / row["decode_ms"])
    assert len(snap["output_error"]) == len(snap["mass"]) == 2
    assert all(0 < mass < 1 for mass in snap["mass"]) and snap["mass"] != floor["mass"]


def test_a_row_prints_the_command_that_makes_it_again(whole: tuple[dict[str, Any], Path]) -> None:
    row = whole[0]["rows"][6]
    assert shlex.split(row["command"]) == [
        "saccade", "compare", "--model", "tiny", "--methods", "snapkv(budget=0.5)", "--tasks", "text(answer=16)",
        "--lengths", str(LENGTH), "--samples", "2", "--mode", "aware", "--seed", "0", "--dtype", "float32",
    ]  # fmt: skip


def test_the_picture_is_of_a_needle_in_the_middle(whole: tuple[dict[str, Any], Path]) -> None:
    attention = whole[0]["attention"]
    assert cells.PICTURE_LENGTH == 1024
    assert (attention["length"], attention["pool"], attention["failed"]) == (256, 8, {})
    head = attention["layers"][0]["heads"][0]
    assert head["size"] == 32
    assert set(head["selections"]) == {"random(budget=0.5)", "snapkv(budget=0.5)", "quest(budget=64, dense_layers=0)"}


def test_a_failing_cell_is_one_row(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "PICTURE_LENGTH", 256)
    result = small([broken, "random(budget=0.5)"], samples=1, fidelity=True, attention=True)
    rows = by_method(result)
    assert {name: row["status"] for name, row in rows.items()} == {
        "dense": "ok", broken: "failed", "random(budget=0.5)": "ok",
    }  # fmt: skip
    failed = rows[broken]
    assert failed["error"] == "RuntimeError: this policy is broken"
    assert "no errors by layer" in failed["note"]
    assert failed["score"] is None and failed["samples"] == 0
    assert failed["kv_bytes_dense"] == rows["dense"]["kv_bytes"]
    assert len(rows["random(budget=0.5)"]["mass"]) == 2
    assert set(result["attention"]["failed"]) == {broken}


def test_the_same_prompts_for_every_method_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[bytes]] = {}
    plain = cells.run_sample

    def spy(model: Any, codec: Any, prompt: Any, mode: Any, session: Any) -> Any:
        seen.setdefault("dense" if session is None else "random", []).append(prompt.sample.context)
        return plain(model, codec, prompt, mode, session)

    monkeypatch.setattr(cells, "run_sample", spy)
    first = small(["random(budget=1.0)"], tasks=["text(answer=16)"])
    assert seen["dense"] == seen["random"] and len(seen["dense"]) == 3, "a warm-up and two samples"
    rows = by_method(first)
    assert rows["random(budget=1.0)"]["scores"] == pytest.approx(rows["dense"]["scores"]), "nothing was dropped"
    again = small(["random(budget=1.0)"], tasks=["text(answer=16)"])
    assert [row["scores"] for row in again["rows"]] == [row["scores"] for row in first["rows"]]


def test_an_interrupted_run_leaves_a_whole_file_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "result.json"

    quick = {"json_path": path, "samples": 1, "tasks": ["text(answer=16)"]}

    def stop(step: Progress) -> None:
        if step.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(["random(budget=0.5)"], progress=stop, **quick)
    (row,) = json.loads(path.read_text())["rows"]
    assert row["method"] == "dense"

    ran: list[str] = []
    result = small(["random(budget=0.5)"], resume=True, progress=lambda step: ran.append(step.doing), **quick)
    assert not any(doing.startswith("dense") for doing in ran), "a cell that is ok is not run again"
    assert [row["method"] for row in result["rows"]] == ["dense", "random(budget=0.5)"]
    assert result["rows"][0] == row
    assert result["rows"][1]["kv_bytes_dense"] == row["kv_bytes"], "compared with the dense row of the file"

    more = small(["random(budget=0.5)"], resume=True, **quick | {"lengths": [LENGTH + 10]})
    assert [(r["method"], r["length"]) for r in more["rows"]] == [
        ("dense", LENGTH), ("random(budget=0.5)", LENGTH), ("dense", LENGTH + 10), ("random(budget=0.5)", LENGTH + 10),
    ]  # fmt: skip
    assert more["settings"]["lengths"] == [LENGTH, LENGTH + 10]


def test_failed_cells_are_run_again_on_resume(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "result.json"
    small([broken], json_path=path, floor=False, samples=1)
    old = json.loads(path.read_text())
    ran: list[str] = []

    def record(step: Progress) -> None:
        ran.append(step.doing)

    small([broken], json_path=path, floor=False, samples=1, resume=True, progress=record)
    assert set(ran) == {f"{broken}, needle at {LENGTH}"}
    assert len(json.loads(path.read_text())["rows"]) == len(old["rows"]) == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"samples": 1}, r"samples 2 \(now 1\)"),
        ({"seed": 5}, r"seed 0 \(now 5\)"),
        ({"mode": "agnostic"}, "mode 'aware'"),
        ({"name": "other"}, "model 'tiny' \\(now 'other'\\)"),
    ],
)
def test_a_file_of_other_settings_is_refused(whole: tuple[dict[str, Any], Path], changes: dict[str, Any], says: str) -> None:
    before = whole[1].read_text()
    with pytest.raises(ValueError, match=says):
        small(["snapkv"], json_path=whole[1], resume=True, **changes)
    assert whole[1].read_text() == before


@pytest.mark.parametrize(
    ("content", "says"), [("{", "is not JSON"), ('{"schema": "other/1", "rows": []}', "is not a comparison of schema")]
)
def test_a_file_of_another_kind_is_not_resumed(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=says):
        small(["random"], json_path=path, resume=True)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1, not 0"),
        ({"lengths": [0]}, "each length must be"),
        ({"lengths": [100]}, "length 100 is below the minimum of task needle"),
        ({"lengths": [2_000_000]}, "pass a longer text"),
        ({"tasks": []}, "nothing to run"),
        ({"tasks": ["nedle"]}, "did you mean needle"),
        ({"mode": "blind"}, "use aware"),
        ({"methods": ["snapvk"]}, "did you mean snapkv"),
        ({"methods": []}, "no methods were given"),
        ({"resume": True}, "there is no file to resume"),
        ({"json_path": "/nowhere/at/all.json"}, "does not exist"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("a sample ran")

    monkeypatch.setattr(cells, "run_sample", never)
    settings = {"methods": ["random"], **changes}
    with pytest.raises(ValueError, match=says):
        small(settings.pop("methods"), **settings)


def test_a_method_that_needs_calibration_gets_it_once_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "CALIBRATION", (2, 128))
    made: list[Any] = []
    plain = cells.calibrate
    monkeypatch.setattr(cells, "calibrate", lambda *args: made.append(plain(*args)) or made[-1])
    tasks = ["text(answer=16)", "dictionary"]
    result = small(["loki(budget=0.5)"], tasks=tasks, samples=1, floor=False)
    assert len(made) == 1
    rows = [row for row in result["rows"] if row["slug"] == "loki"]
    assert [row["note"] for row in rows] == ["calibrated on 2 x 128 tokens of the text"] * 2
    given = small(["loki(budget=0.5)"], tasks=tasks[:1], samples=1, floor=False, plans=made)
    assert len(made) == 1
    assert by_method(given)["loki(budget=0.5)"]["note"] is None
    assert by_method(given)["loki(budget=0.5)"]["status"] == "ok"


def test_a_model_is_left_as_it_was() -> None:
    model, _ = tiny()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        small(["snapkv(budget=0.5)"], samples=1, fidelity=True)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
