"""Jobs of a study: finished ones are read, failures and the time that is up leave the others, workers give the same numbers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from saccade.evaluate.study import RESULT, Job, folder_name, open_study, read_result, run_jobs, shrunk, solved_at
from saccade.train.recipe import Evaluation, Recipe, Rule


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def job(name: str, folder: Path, rate: float = 1e-3, **changes) -> Job:
    model = {
        "layers": ["softmax"], "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "max_position_embeddings": 16,
    }  # fmt: skip
    given = {"steps": 3, "evaluate": Evaluation(every=1, batches=1), **changes}
    recipe = Recipe(
        model=model, data={"set": "mqar", "length": 16, "pairs": 2, "vocab": 8}, optimizer=Rule(rate=rate), batch=2, device="cpu", **given
    )
    return Job(name=name, folder=folder / name, recipe=recipe)


def test_a_finished_job_is_read_and_not_run_again(tmp_path: Path) -> None:
    jobs = [job("one", tmp_path), job("two", tmp_path)]
    seen: list[str] = []
    first = run_jobs(jobs, finished=lambda name, outcome: seen.append(f"{name} {len(outcome.finished)}"))
    assert seen == ["one 1", "two 2"] and not first.failed and not first.missing
    assert [step for step, _ in first.finished["one"]["curve"]] == [1, 2, 3] and first.finished["one"]["steps"] == 3
    trained: list[str] = []
    again = run_jobs(jobs, progress=lambda name, row: trained.append(name))
    assert again == first and not trained
    (tmp_path / "two" / RESULT).unlink()  # as a kill leaves it: the run goes on from its checkpoint
    once_more = run_jobs(jobs)
    assert once_more.finished["two"]["scores"] == first.finished["two"]["scores"]


def test_a_result_of_another_recipe_does_not_count(tmp_path: Path) -> None:
    run_jobs([job("one", tmp_path)])
    assert read_result(job("one", tmp_path)) is not None
    assert read_result(job("one", tmp_path, log=7)) is not None  # changes no number
    assert read_result(job("one", tmp_path, seed=1)) is None
    (tmp_path / "one" / RESULT).write_text("{")
    with pytest.raises(ValueError, match="can't be read as JSON: remove it"):
        read_result(job("one", tmp_path))


def test_one_failure_leaves_the_others(tmp_path: Path) -> None:
    outcome = run_jobs([job("bad", tmp_path, rate=1e30), job("good", tmp_path)])
    assert list(outcome.finished) == ["good"] and "lower optimizer.rate" in outcome.failed["bad"]


def test_no_job_starts_when_the_time_is_up(tmp_path: Path) -> None:
    run_jobs([job("one", tmp_path)])
    outcome = run_jobs([job("two", tmp_path), job("one", tmp_path)], seconds=0)
    assert outcome.missing == ["two"] and list(outcome.finished) == ["one"] and not (tmp_path / "two").exists()
    with pytest.raises(ValueError, match="workers is 0"):
        run_jobs([], workers=0)


@pytest.mark.slow
def test_workers_give_the_numbers_of_one(tmp_path: Path) -> None:
    names = ["a", "b", "c", "bad"]
    alone = run_jobs([job(name, tmp_path / "alone", seed=i, rate=1e30 if name == "bad" else 1e-3) for i, name in enumerate(names)])
    rows: list[str] = []
    jobs = [job(name, tmp_path / "together", seed=i, rate=1e30 if name == "bad" else 1e-3) for i, name in enumerate(names)]
    together = run_jobs(jobs, workers=2, progress=lambda name, row: rows.append(name))
    assert {name: found["curve"] for name, found in together.finished.items()} == {n: f["curve"] for n, f in alone.finished.items()}
    assert list(together.failed) == ["bad"] and {"a", "b", "c"} <= set(rows)


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


@pytest.mark.slow
def test_a_worker_that_dies_fails_its_job_alone(tmp_path: Path) -> None:
    jobs = [job("bad", tmp_path), job("one", tmp_path), job("two", tmp_path)]
    jobs[0].recipe.data["length"] = Deadly()
    outcome = run_jobs(jobs, workers=2)
    assert outcome.failed == {"bad": "its process ended with the code 3 before it had finished"}
    assert sorted(outcome.finished) == ["one", "two"]


@dataclass(frozen=True, kw_only=True)
class Shared:
    steps: int = 5
    length: int = 7


def test_a_study_keeps_its_settings(tmp_path: Path) -> None:
    out = tmp_path / "study"
    write = open_study(out, "kind/1", Shared(), "the command", "cpu")
    assert json.loads((out / "study.json").read_text())["rows"] == []
    found = write(rows=[1], failed={}, missing=[])
    assert json.loads((out / "study.json").read_text()) == found and found["settings"] == {"steps": 5, "length": 7}
    open_study(out, "kind/1", Shared(), "", "cpu")
    assert json.loads((out / "study.json").read_text())["rows"] == [1]
    with pytest.raises(ValueError, match="made with steps 5, but 6 was given now"):
        open_study(out, "kind/1", shrunk(Shared(), steps=6, length=None), "", "cpu")
    with pytest.raises(ValueError, match="another kind of study"):
        open_study(out, "kind/2", Shared(), "", "cpu")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        open_study(out / "study.json", "kind/1", Shared(), "", "cpu")


def test_names_and_curves() -> None:
    assert folder_name("deltanet*3,softmax") == "deltanet-3-softmax"
    assert len({folder_name(name) for name in ("a(x=1)", "a(x=-1)", "a-x-1")}) == 3
    assert solved_at([[10, 0.5], [20, 0.96], [30, 0.99]]) == 20 and solved_at([]) is None
