"""Recipes: what a file may say, what is refused and how, and that the examples in the documentation run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from saccade.train.loop import train
from saccade.train.recipe import Recipe, Schedule, read_recipe, recipe_from

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.yaml"))
GOOD = "model: {architecture: llama}\ndata: {set: mqar}\nsteps: 10\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_file_becomes_a_recipe(tmp_path: Path) -> None:
    more = "optimizer: {name: muon, rate: 3e-3, betas: [0.9, 1e-1]}\nevaluate: {every: 5, data: {pairs: 4}}\nprecision: bfloat16\n"
    recipe = read_recipe(written(tmp_path, GOOD + more))
    assert recipe.optimizer.rate == 0.003 and recipe.optimizer.betas == (0.9, 0.1) and recipe.evaluate.data == {"pairs": 4}
    assert recipe.precision == "bfloat16" and recipe.steps == 10 and recipe.batch == 32 and recipe.device is None
    assert recipe.lasting(None, 20.0).seconds == 20.0 and recipe.lasting(None, 20.0).steps is None and recipe.lasting() is recipe


def test_paths_start_from_the_file(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, "model: models/one\ndata: {set: bytes, folder: text}\nsteps: 1\n"))
    assert recipe.model == str(tmp_path / "models/one") and recipe.data["folder"] == str(tmp_path / "text")
    assert read_recipe(written(tmp_path, "model: pocket\ndata: {set: bytes, folder: /text}\nsteps: 1\n")).data["folder"] == "/text"
    assert read_recipe(tmp_path / "recipe.yaml").model == "pocket"


@pytest.mark.parametrize(("text", "message"), [
    ("", "holds NoneType, expected a mapping with the keys model and data"),
    ("- model", "holds list"),
    ("model: {a: [}\n", "recipe.yaml, line 1 can't be read as YAML"),
    ("data: {set: mqar}\nsteps: 3\n", "lacks model: add it"),
    (GOOD + "stepz: 3\n", "recipe.yaml has no key 'stepz': did you mean steps"),
    (GOOD + "optimizer: {rat: 1}\n", "recipe.yaml.optimizer has no key 'rat': did you mean rate"),
    (GOOD + "optimizer: {rate: fast}\n", "recipe.yaml.optimizer.rate is 'fast', expected a number"),
    (GOOD + "optimizer: {rate: .nan}\n", "recipe.yaml.optimizer.rate is nan"),
    (GOOD + "optimizer: {rate: -1}\n", "recipe.yaml.optimizer: rate is -1.0, expected a positive number"),
    (GOOD + "optimizer: {name: adam}\n", "optimizer.name is 'adam', expected one of adamw, muon"),
    (GOOD + "optimizer: {betas: [0.9]}\n", "optimizer.betas has 1 entries, expected 2"),
    (GOOD + "optimizer: muon\n", "optimizer is 'muon', expected a mapping"),
    (GOOD + "schedule: {warmup: 1.5}\n", "schedule.warmup is 1.5, expected a whole number"),
    (GOOD + "schedule: {decay: 0}\n", "decay is 0.0, expected a share"),
    (GOOD + "batch: yes\n", "batch is True, expected a whole number"),
    (GOOD + "compile: 1\n", "compile is 1, expected true or false"),
    (GOOD + "batch: 9\naccumulate: 2\n", "a batch of 9 sequences can't be run in 2 equal parts"),
    (GOOD + "seconds: 5\n", "steps 10 and seconds 5.0 were given, expected exactly one"),
    (GOOD + "evaluate: {data: {set: bytes}}\n", "data changes the set itself"),
    (GOOD + "device: tpu\n", "device is 'tpu', expected one of cpu, cuda"),
    (GOOD.replace("{architecture: llama}", "7"), "model is 7, expected a text or a mapping"),
])  # fmt: skip
def test_refusals(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        read_recipe(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_no_text_and_code_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"recipe\.yaml.* can't be read as YAML"):
        read_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match="can't be read as YAML"):
        read_recipe(written(tmp_path, GOOD + "seed: !!python/object/apply:os.getpid []\n"))


def test_schedules() -> None:
    def shares(schedule: Schedule, steps: int = 100) -> list[float]:
        return [schedule.share(step, step / steps, steps) for step in range(steps)]

    constant = shares(Schedule(name="constant", warmup=10))
    assert constant[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and set(constant[10:]) == {1.0}
    cosine = shares(Schedule(name="cosine", warmup=20, final=0.1))
    assert cosine[19] == cosine[20] == 1.0 and cosine[60] == pytest.approx(0.55) and cosine[-1] == pytest.approx(0.1, abs=0.002)
    assert all(a >= b for a, b in pairwise(cosine[20:]))
    wsd = shares(Schedule(name="wsd", warmup=5, decay=0.2, final=0.0))
    assert set(wsd[5:81]) == {1.0} and wsd[90] == pytest.approx(0.5) and wsd[99] == pytest.approx(0.05)
    assert Schedule(warmup=0).share(0, 0.0, None) == 1.0 and Schedule(warmup=5).share(9, 1.0, None) == pytest.approx(0.1)


def test_a_recipe_needs_no_file() -> None:
    assert recipe_from({"model": "pocket", "data": {"set": "mqar"}, "steps": 1}) == Recipe(model="pocket", data={"set": "mqar"}, steps=1)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.steps is not None and recipe.steps >= 100
    short = replace(recipe, steps=2, batch=2 * recipe.accumulate, device="cpu", threads=1, evaluate=replace(recipe.evaluate, batches=1))
    result = train(short, tmp_path / "run")
    assert result.steps == 2 and 0 <= result.scores["accuracy"] <= 1 and (tmp_path / "run" / "curve.html").exists()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3
