"""Which layers of a converted model stay as they were: those whose conversion costs recall and little else.

One layer at a time is replaced by its taught mixer in the model as it was, and two abilities are measured, each from 0 to 1: recall r
(facts asked for in a long text) and common sense c (what any text asks for).

    score_i = max(0, r - r_i) / (max(0, c - c_i) + 0.01)

The first and the last layer stay in any case, and of the others those with the largest scores. The paper names the two losses and their
relation; the formula is the simplest one that fits.

Source: minicpm-sala, arXiv 2602.11761.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from saccade.core.files import atomic_write
from saccade.models.decoder import SaccadeForCausalLM

CHOICE = "layers.json"
SCHEMA = "saccade.layers/1"
FLOOR = 0.01  # of the common sense that a score divides by: losses below it are noise
Measure = Callable[[PreTrainedModel], tuple[float, float]]  # (recall, common sense) of a model, each from 0 to 1


@dataclass(frozen=True)
class Trial:
    """What the model with one converted layer can do."""

    layer: int
    recall: float
    common: float
    score: float


@dataclass(frozen=True)
class Choice:
    """kept: the layers that stay. recall, common: of the model as it was. trials: of every layer that could be chosen."""

    kept: list[int]
    recall: float
    common: float
    trials: list[Trial]

    def write(self, path: Path) -> None:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n", encoding="utf-8")


def read_choice(path: Path) -> list[int] | None:
    """The layers that stay by the choice in a file, None where there is none. ValueError for a file of another kind."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = [int(layer) for layer in found["kept"]] if found["schema"] == SCHEMA else None
    except (ValueError, KeyError, TypeError):
        kept = None
    if kept is None:
        raise ValueError(f"{path} holds no choice of layers: remove it, and the layers are measured again")
    return kept


def selected(pattern: str, layers: int) -> int | None:
    """How many of so many layers "select" (a quarter, and one more than the two ends at least) or "select:3" keeps; None for patterns of
    other kinds. ValueError where it is fewer than the two ends or more than there are."""
    found = re.fullmatch(r"select(?::(\d+))?", pattern)
    if found is None:
        return None
    count = int(found[1]) if found[1] else min(layers, max(3, round(layers / 4)))
    if not 2 <= count <= layers:
        raise ValueError(f"{pattern} of {layers} layers: the first and the last stay, so give from 2 to {layers}")
    return count


def choose_layers(
    before: SaccadeForCausalLM, taught: SaccadeForCausalLM, measure: Measure, count: int,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Choice:  # fmt: skip
    """The `count` layers that stay. before: the model with no layer converted; taught: with all of them, after the attention transfer.

    `before` is changed while this runs and is as it was at the end. Between equal scores the earlier layer stays. `progress` gets {stage,
    step, layer, recall, common, score}.
    """
    blocks: Any = before.model.stack.blocks
    recall, common = measure(before)
    trials: list[Trial] = []
    for layer in range(1, len(blocks) - 1) if count > 2 else ():
        own = blocks[layer].mixer
        blocks[layer].mixer = taught.model.stack.blocks[layer].mixer
        try:
            found = measure(before)
        finally:
            blocks[layer].mixer = own
        score = max(0.0, recall - found[0]) / (max(0.0, common - found[1]) + FLOOR)
        trials.append(Trial(layer, found[0], found[1], score))
        if progress is not None:
            progress({"stage": "choice", "step": len(trials), **asdict(trials[-1])})
    ranked = sorted(trials, key=lambda trial: -trial.score)[: count - 2]
    kept = sorted({0, len(blocks) - 1, *(trial.layer for trial in ranked)})
    return Choice(kept, recall, common, trials)
