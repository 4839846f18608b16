"""The trainer that runs a recipe: small, exact, alone or under `torchrun`.

What a step draws follows from the seed and the step's number: batches and the random state alike. A checkpoint therefore only has to
hold weights, optimizer state and a few counters, and a run that was killed anywhere goes on to the same numbers. A batch's loss is the
mean over all its targets, however the batch is cut into parts and shared out to processes.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from saccade.core.files import atomic_write
from saccade.models.pocket import quiet
from saccade.train.checkpoint import gather_state, latest_checkpoint, load_checkpoint, read_counters, reason, write_checkpoint
from saccade.train.curve import write_curve
from saccade.train.distributed import Ranks, join, shard, whole
from saccade.train.metrics import FILE as METRICS
from saccade.train.metrics import append_row, cut_rows, read_rows
from saccade.train.models import build_model
from saccade.train.optimizers import build_optimizers
from saccade.train.recipe import Recipe
from saccade.train.sets import IGNORE, TokenSet, build_set
from saccade.train.sets.base import Stream, derive_seed

CURVE = "curve.html"
WEIGHTS = "weights"
FIXED = ("model", "data", "optimizer", "batch", "accumulate", "precision", "seed")  # what a run keeps when it is resumed
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left: the folder of its weights, its steps and seconds, and the last evaluation ("loss", "accuracy", ...)."""

    weights: Path
    steps: int
    seconds: float
    scores: dict[str, float]


def train(recipe: Recipe, out: str | Path, progress: Callable[[Row], None] | None = None) -> Result:
    """Run a recipe, or go on from the last checkpoint under `out`.

    `out` receives `recipe.json`, `metrics.jsonl` (a row every `recipe.log` steps and at every evaluation), `checkpoints/`, `curve.html`
    and, at the end, `weights/`, which any `from_pretrained` can load. `progress` is called with every row. Under `torchrun` every process
    calls this; the first one writes. Raises ValueError, in one sentence, for a recipe that does not fit its model, data, machine, or the
    run that `out` holds, for a loss that is no number, and where `out` can't be written; the last good checkpoint then stays.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with join(recipe.device) as ranks:
        return _Run(recipe, Path(out), ranks, progress).go()


class _Run:
    """The state of one call of `train`."""

    def __init__(self, recipe: Recipe, out: Path, ranks: Ranks, report: Callable[[Row], None] | None) -> None:
        self.recipe, self.out, self.ranks, self.report = recipe, out, ranks, report
        parts = recipe.accumulate * ranks.world
        if recipe.batch % parts:
            raise ValueError(f"a batch of {recipe.batch} sequences can't be run in {recipe.accumulate} parts by {ranks.world} processes: "
                             f"give a batch that is a multiple of {parts}")  # fmt: skip
        self.set = build_set(recipe.data)
        changed = recipe.evaluate.data
        self.exam = build_set({**recipe.data, **changed}, "evaluate.data") if changed else self.set
        self.vocabulary = max(self.set.vocabulary, self.exam.vocabulary)
        self.made = plain_recipe(recipe, self.set)
        found = latest_checkpoint(out)
        if found is not None:
            check_same(read_counters(found).get("recipe", {}), self.made, found)
        self.model = build_model(recipe.model, self.vocabulary, recipe.seed).to(ranks.device)  # type: ignore[arg-type]
        self._check_length()
        if recipe.gradient_checkpointing:
            # the old name warns where the new one exists
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        shard(self.model, ranks)
        self.optimizers = build_optimizers(self.model, recipe.optimizer)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.step, self.elapsed, self.tokens = 0, 0.0, 0
        self.scores: dict[str, float] = {}
        if found is not None:
            counters = load_checkpoint(found, self.model, self.optimizers)
            self.step, self.elapsed, self.tokens = counters["step"], counters["elapsed"], counters["tokens"]
            self.scores = counters["scores"]
        if ranks.rank == 0:
            self._begin()
        if recipe.compile:
            self.model.compile(dynamic=False)

    def go(self) -> Result:
        began = time.monotonic() - self.elapsed
        done = self._done(began)
        while done < 1.0:
            row = self._step(done)
            self.step += 1
            self.tokens += self.recipe.batch * self.set.context
            self.elapsed = time.monotonic() - began
            done = self._done(began)
            self._after(row, last=done >= 1.0)
        self._save()
        weights = self._export()
        self._draw()
        return Result(weights=weights, steps=self.step, seconds=self.elapsed, scores=self.scores)

    def _begin(self) -> None:
        with self._writing("the run's files"):
            self.out.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.out / "recipe.json") as temporary:
                temporary.write_text(json.dumps(self.made, indent=1) + "\n", encoding="utf-8")
            cut_rows(self.out / METRICS, self.step)  # what came after the checkpoint will be written again

    def _check_length(self) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(self.set.context, self.exam.context)
        if isinstance(limit, int) and longest > limit:
            raise ValueError(f"a sequence of the data has {longest} tokens, but the model serves {limit}: give the model more positions, "
                             "or a shorter data.length")  # fmt: skip

    def _done(self, began: float) -> float:
        if self.recipe.steps is not None:
            return self.step / self.recipe.steps
        return self.ranks.agree((time.monotonic() - began) / (self.recipe.seconds or 1.0))

    def _step(self, done: float) -> dict[str, Tensor | float]:
        recipe, ranks = self.recipe, self.ranks
        rate = recipe.optimizer.rate * recipe.schedule.share(self.step, done, recipe.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        torch.manual_seed(derive_seed(recipe.seed, "step", self.step, ranks.rank))
        self.model.train()
        tokens, targets = self._rows("train", self.set, self.step)
        count = ranks.total((targets != IGNORE).sum().double()).clamp(min=1).item()
        loss = torch.zeros((), device=ranks.device)
        parts = (tensor.to(ranks.device, non_blocking=True).chunk(recipe.accumulate) for tensor in (tokens, targets))
        for words, wanted in zip(*parts, strict=True):
            share = _nats(self._logits(words), wanted) / count
            (share * ranks.world).backward()  # sharded gradients are averaged over the processes, but a sum is meant
            loss += share.detach()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.params, recipe.optimizer.clip or math.inf))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"loss": ranks.total(loss), "gradient norm": norm, "rate": rate}

    def _after(self, made: dict[str, Tensor | float], last: bool) -> None:
        """Log, evaluate and save what is due; a number is read from the device only then, for reading waits for it."""
        recipe, every = self.recipe, self.recipe.evaluate.every
        examined = last or (every > 0 and self.step % every == 0)
        logged = examined or self.step % recipe.log == 0
        saved = self.step % recipe.checkpoint == 0 and not last
        if not (logged or saved or last):
            return
        row = {name: float(value) for name, value in made.items()}
        if not math.isfinite(row["loss"]) or not math.isfinite(row["gradient norm"]):
            raise ValueError(
                f"at step {self.step} the loss is {row['loss']} and the gradient's length {row['gradient norm']}: lower optimizer.rate or "
                f"raise schedule.warmup; the last good checkpoint is {latest_checkpoint(self.out)}"
            )
        if examined:
            self.scores = self._evaluate()
            row |= {f"eval {name}": value for name, value in self.scores.items()}
        if logged:
            self._log(row)
        if saved:
            self._save()
            self._draw()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        self.model.eval()
        sums: dict[str, Tensor] = {}
        for number in range(self.recipe.evaluate.batches):
            tokens, targets = (x.to(self.ranks.device) for x in self._rows("evaluate", self.exam, number))
            logits = self._logits(tokens)
            found = {"loss": (_nats(logits, targets), (targets != IGNORE).sum()), **self.exam.score(logits, tokens, targets)}
            for name, pair in found.items():
                sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + torch.stack([x.double().cpu() for x in pair])
        both = self.ranks.total(torch.stack(list(sums.values()))).cpu()
        return {name: (part / count).item() for name, (part, count) in zip(sums, both, strict=True)}

    def _rows(self, stream: Stream, source: TokenSet, number: int) -> tuple[Tensor, Tensor]:
        size = self.recipe.batch // self.ranks.world
        first = self.ranks.rank * size
        return source.rows(self.recipe.seed, stream, number, self.recipe.batch, first, first + size)

    def _logits(self, tokens: Tensor) -> Tensor:
        half = self.recipe.precision == "bfloat16"
        with torch.autocast(self.ranks.device.type, torch.bfloat16) if half else nullcontext():
            return self.model(tokens, use_cache=False).logits

    def _log(self, row: dict[str, float]) -> None:
        if self.ranks.rank:
            return
        full: Row = {"step": self.step, "seconds": round(self.elapsed, 2), "tokens": self.tokens, **row}
        with self._writing(METRICS):
            append_row(self.out / METRICS, full)
        if self.report is not None:
            self.report(full)

    def _save(self) -> None:
        first = self.ranks.rank == 0
        tensors = gather_state(self.model, self.optimizers, keep=first)
        if first:
            counters = {"elapsed": self.elapsed, "tokens": self.tokens, "scores": self.scores, "recipe": self.made}
            write_checkpoint(self.out, self.step, tensors, counters)

    def _export(self) -> Path:
        state = {name: whole(t).cpu() for name, t in self.model.state_dict().items()}
        folder = self.out / WEIGHTS
        if self.ranks.rank == 0:
            model = build_model(self.recipe.model, self.vocabulary, self.recipe.seed)
            model.load_state_dict(state)
            partial = folder.with_name(f".{WEIGHTS}.partial")
            with self._writing(WEIGHTS), quiet():
                shutil.rmtree(partial, ignore_errors=True)
                model.save_pretrained(partial)
                tokenizer = self.set.tokenizer()
                if tokenizer is not None:
                    tokenizer.save_pretrained(partial)
                shutil.rmtree(folder, ignore_errors=True)
                partial.replace(folder)
        return folder

    def _draw(self) -> None:
        if self.ranks.rank == 0:
            with self._writing(CURVE):
                write_curve(read_rows(self.out / METRICS), self.made, self.out / CURVE)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Around a write: what fails becomes one sentence that says what is still there."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{what} can't be written to {self.out} ({reason(error)}): free some space or choose another folder, and start again; the "
                f"last good checkpoint is {latest_checkpoint(self.out)}"
            ) from error


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def plain_recipe(recipe: Recipe, source: TokenSet) -> dict[str, Any]:
    """The recipe as plain JSON data, with the fingerprint of what the set reads."""
    return json.loads(json.dumps({**asdict(recipe), "fingerprint": source.fingerprint()}, default=str))


def check_same(before: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """Raise ValueError where a run's checkpoint and a recipe differ in what may not change."""
    for key in FIXED:
        if before.get(key) == now[key]:
            continue
        old, new, name = before.get(key), now[key], key
        if isinstance(old, dict) and isinstance(new, dict):
            inner = next(part for part in {**old, **new} if old.get(part) != new.get(part))
            old, new, name = old.get(inner), new.get(inner), f"{key}.{inner}"
        raise ValueError(f"{checkpoint} is of a run with {name} {json.dumps(old)}, but the recipe says {json.dumps(new)}: restore it, or "
                         "choose another output folder")  # fmt: skip
    if before.get("fingerprint") != now["fingerprint"]:
        raise ValueError(f"the files that data reads have changed since {checkpoint} was written: restore them, or choose another folder")
