"""Tokens per second of decoding against the batch size, method by method, until the memory is full."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median, quantiles
from typing import Any

import torch
from transformers import PreTrainedModel

from saccade.attach import attach
from saccade.evaluate.cells import Spot, sentence
from saccade.evaluate.contenders import Contender
from saccade.evaluate.lockstep import Rows
from saccade.evaluate.memory import Peak
from saccade.evaluate.tasks import build

Lines = list[dict[str, Any]]  # of the result
STEPS = 32  # that are timed
UNTIMED = 2  # before them: the first one builds a decode method's index
TEXTS = 4  # different prompts; larger batches repeat them
FULL = "out of memory"
# what torch's CPU allocator and the system say, which have no exception of their own
_FULL_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


def check_batches(batches: Sequence[int], steps: int) -> None:
    """Raise ValueError for what is no list of batch sizes."""
    for what, value in (("each batch", batch) for batch in batches):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{what} must be a whole number of at least 1, not {value!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, not {steps!r}")


def measure_throughput(
    spot: Spot, line: Sequence[Contender], lengths: Sequence[int], batches: Sequence[int], *, steps: int = STEPS,
    known: Sequence[dict[str, Any]] = (), tell: Callable[[str], None] = lambda _: None, save: Callable[[Lines], None] = lambda _: None,
) -> Lines:  # fmt: skip
    """Rows for each length, contender and batch: `batch` prompts of running text, then `steps` single greedy steps.

    known: rows of an earlier run, which stay. save gets the rows after each new one. A batch that does not fit has the status "full", and
    the larger ones of that contender are not tried; other failures are told in their rows and the rest goes on.
    """
    old = {(row["method"], row["length"], row["batch"]): row for row in known if row["status"] != "failed"}
    rows = [*old.values()]
    for length in lengths:
        dense: dict[int, dict[str, Any]] = {}
        for contender in line:
            full = False
            for batch in sorted(set(batches)):
                key = (contender.spec, length, batch)
                row = old.get(key)
                if row is None:
                    row = _blank(contender, length, batch, steps)
                    rows.append(row)
                    if full:
                        row |= {"status": "full", "error": f"{FULL} in a smaller batch"}
                    else:
                        tell(f"{contender.spec}, batch {batch} at {length}")
                        _measure(row, spot, contender, steps)
                full = full or row["status"] == "full"
                if contender.dense:
                    dense[batch] = row
                rival = dense.get(batch, row)
                if row["tokens_per_second"] and rival["tokens_per_second"]:
                    row["speedup"] = row["tokens_per_second"] / rival["tokens_per_second"]
                save(rows)
    return rows


def _blank(contender: Contender, length: int, batch: int, steps: int) -> dict[str, Any]:
    return {
        "method": contender.spec, "slug": contender.slug, "length": length, "batch": batch, "status": "failed", "error": None,
        "steps": steps, "tokens_per_second": None, "speedup": None, "step_ms": None, "step_ms_low": None, "step_ms_high": None,
        "prefill_ms": None,
        "prefill_tokens_per_second": None, "decode_density": None, "kv_bytes": None, "index_bytes": None, "host_bytes": None,
        "peak_bytes": None,
    }  # fmt: skip


def _measure(row: dict[str, Any], spot: Spot, contender: Contender, steps: int) -> None:
    """Fill a row, or write into it why there is nothing."""
    try:
        if contender.broken:
            raise ValueError(contender.broken)
        row |= _run(spot, contender, row["length"], row["batch"], steps)
    except Exception as error:  # one method's failure must not cost the others their numbers
        full = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error).lower() for words in _FULL_WORDS)
        row |= {"status": "full", "error": FULL} if full else {"error": contender.broken or sentence(error)}
    # what failed is held by its exception until here
    gc.collect()
    if next(spot.model.parameters()).device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def _run(spot: Spot, contender: Contender, length: int, batch: int, steps: int) -> dict[str, Any]:
    model: PreTrainedModel = spot.model
    prompts = [spot.prompt(build("text"), length, index).context for index in range(min(TEXTS, batch))]
    shortest = min(map(len, prompts))  # tokenizers that are not of bytes may differ by a token
    ids = [prompts[i % len(prompts)][:shortest] for i in range(batch)]
    methods: dict[str, Any] = dict(contender.methods)
    meter = Peak(next(model.parameters()).device)
    with attach(model, **methods, plan=contender.plans, seed=spot.seed) if methods else nullcontext() as session:
        rows = Rows(model, session)
        gc.collect()
        meter.start()
        logits, prefill = rows.feed(ids)
        prefill += rows.compress()
        kv_bytes = rows.kv_bytes
        times = []
        for _ in range(UNTIMED + steps):
            logits, took = rows.feed(logits[:, -1].argmax(-1, keepdim=True).tolist())
            times.append(took)
        peak = meter.stop()
        stats = None if session is None else session.stats()
    timed = times[UNTIMED:]
    middle = median(timed)
    low, high = (quantiles(timed, n=10)[i] for i in (0, 8)) if len(timed) > 1 else (middle, middle)
    return {
        "status": "ok", "tokens_per_second": 1e3 * batch / middle, "step_ms": middle, "step_ms_low": low, "step_ms_high": high,
        "prefill_ms": prefill, "prefill_tokens_per_second": 1e3 * batch * shortest / prefill,
        "decode_density": 1.0 if stats is None else stats.decode_density, "kv_bytes": kv_bytes,
        "index_bytes": 0 if stats is None else stats.index_bytes, "host_bytes": 0 if stats is None else stats.host_bytes,
        "peak_bytes": peak,
    }  # fmt: skip
