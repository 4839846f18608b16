"""A training recipe: what a YAML file may say, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import cos, pi
from pathlib import Path
from typing import Any, Literal

from saccade.train.fields import read_fields
from saccade.train.sets.base import require

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """name: "adamw" for everything, or "muon" for the matrices of the layers and adamw for the rest. rate: peak learning rate.
    weight_decay: of matrices; vectors have none, with muon embeddings neither. betas: of adamw. momentum: of muon. clip: longest
    gradient, 0 for any length.
    """

    name: Literal["adamw", "muon"] = "adamw"
    rate: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    clip: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.rate < float("inf"), f"rate is {self.rate}, expected a positive number")
        require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}, expected no negative number")
        require(all(0 <= b < 1 for b in self.betas), f"betas are {self.betas}, expected numbers from 0 to below 1")
        require(0 <= self.momentum < 1, f"momentum is {self.momentum}, expected a number from 0 to below 1")
        require(self.clip >= 0, f"clip is {self.clip}, expected a length, or 0 for no limit")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """name: "constant", "cosine" (falls from the end of the warm-up on) or "wsd" (warm-up, stable, then a linear fall over the last
    `decay` of the run). warmup: steps of a linear rise. final: where a fall ends, as a share of the peak.
    """

    name: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup: int = 20
    decay: float = 0.2
    final: float = 0.1

    def __post_init__(self) -> None:
        require(self.warmup >= 0, f"warmup is {self.warmup}, expected a number of steps")
        require(0 < self.decay <= 1, f"decay is {self.decay}, expected a share of the run between 0 and 1")
        require(0 <= self.final <= 1, f"final is {self.final}, expected a share of the peak from 0 to 1")

    def share(self, step: int, progress: float, steps: int | None) -> float:
        """The rate of step `step` (from 0) as a share of the peak; `progress` is the part of the run in [0, 1] that lies before it."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.name == "constant":
            return rise
        if self.name == "wsd":
            fallen = max(0.0, progress - (1 - self.decay)) / self.decay
            return rise * (1 - (1 - self.final) * min(1.0, fallen))
        start = min(0.99, self.warmup / steps) if steps else 0.0  # a run by the clock does not know what share its warm-up takes
        fallen = min(1.0, max(0.0, progress - start) / (1 - start))
        return rise * (self.final + (1 - self.final) * (1 + cos(pi * fallen)) / 2)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """every: steps between two evaluations, 0 for the end only. batches: how many batches each takes, always the same ones.
    data: arguments of the set that differ in evaluation.
    """

    every: int = 0
    batches: int = 4
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.every >= 0, f"every is {self.every}, expected a number of steps, or 0")
        require(self.batches >= 1, f"batches is {self.batches}, expected at least 1")
        require("set" not in self.data, "data changes the set itself: give other arguments of the same set only")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run. Give `steps` or `seconds`, not both.

    model: a folder, "pocket", or the arguments of a new model (`saccade.train.models.build_model`). data: the set's name under "set",
    and its arguments. batch: sequences a step, over all processes and parts. accumulate: parts that a step's batch is run in, one after
    another. precision: "bfloat16" runs the model under autocast. log, checkpoint: steps between two rows and two checkpoints.
    device: "cpu" or "cuda"; the GPU if there is one. threads: of the CPU; what torch takes if not given.
    """

    model: str | dict[str, Any]
    data: dict[str, Any]
    optimizer: Rule = field(default_factory=Rule)
    schedule: Schedule = field(default_factory=Schedule)
    evaluate: Evaluation = field(default_factory=Evaluation)
    steps: int | None = None
    seconds: float | None = None
    batch: int = 32
    accumulate: int = 1
    precision: Precision = "float32"
    compile: bool = False
    gradient_checkpointing: bool = False
    checkpoint: int = 100
    log: int = 1
    seed: int = 0
    device: Literal["cpu", "cuda"] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        require(
            (self.steps is None) != (self.seconds is None),
            f"steps {self.steps} and seconds {self.seconds} were given, expected exactly one of them",
        )
        require(self.steps is None or self.steps >= 1, f"steps is {self.steps}, expected at least 1")
        require(self.seconds is None or self.seconds > 0, f"seconds is {self.seconds}, expected a positive number")
        for name in ("batch", "accumulate", "checkpoint", "log"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, expected at least 1")
        require(self.threads is None or self.threads >= 1, f"threads is {self.threads}, expected at least 1")
        require(
            self.batch % self.accumulate == 0, f"a batch of {self.batch} sequences can't be run in {self.accumulate} equal parts"
        )

    def lasting(self, steps: int | None = None, seconds: float | None = None) -> Recipe:
        """The same recipe with another length; both None changes nothing."""
        return self if steps is None and seconds is None else replace(self, steps=steps, seconds=seconds)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file; relative paths in it start from the file's folder.

    Raises ValueError or TypeError, in one sentence that names the file and the key, for what can't be read, unknown keys (with the
    nearest ones), wrong types and values out of range; ImportError where PyYAML is missing.
    """
    try:
        import yaml
    except ImportError:
        raise ImportError("recipes are read with PyYAML: pip install 'saccade[train]'") from None

    path = Path(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        spot = getattr(error, "problem_mark", None)
        at = f", line {spot.line + 1}" if spot is not None else ""
        raise ValueError(f"{path}{at} can't be read as YAML: {getattr(error, 'problem', None) or 'it is no UTF-8 text'}") from None
    return recipe_from(given, str(path), path.parent)


def recipe_from(given: Any, where: str = "recipe", base: Path | None = None) -> Recipe:
    """The recipe in a mapping, as a YAML file holds it; see `read_recipe`."""
    if not isinstance(given, Mapping) or not given:
        raise TypeError(f"{where} holds {type(given).__name__}, expected a mapping with the keys model and data, and steps or seconds")
    recipe = read_fields(Recipe, given, where, base)
    # paths inside the free-form mappings and the model's folder start from the recipe too
    model = recipe.model
    if isinstance(model, str) and model != "pocket" and base is not None and not Path(model).expanduser().is_absolute():
        model = str(base / model)
    data = {key: _from(value, base) if key == "folder" else value for key, value in recipe.data.items()}
    return replace(recipe, model=model, data=data)


def _from(value: Any, base: Path | None) -> Any:
    if not isinstance(value, str) or base is None or Path(value).expanduser().is_absolute():
        return value
    return str(base / value)
