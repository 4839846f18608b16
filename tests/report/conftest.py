"""Made-up but lifelike comparison results, and a headless browser to open their pages with.

Run as a script, this file writes fixtures/small.json anew.
"""

from __future__ import annotations

import base64
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Fake:
    """A made-up method: how much it keeps and reads, how far it is off, and how fast it runs against dense."""

    spec: str
    cache: float = 1.0
    prefill: float | None = None
    decode: float | None = None
    loss: float = 0.0
    pattern: str = "columns"
    speed: tuple[float, float] = (0.95, 0.9)
    index: float = 0.0

    @property
    def slug(self) -> str:
        return self.spec.partition("(")[0]


METHODS = (
    Fake("dense", 1.0, 1.0, 1.0, 0.0, speed=(1.0, 1.0)),
    Fake("streaming-llm(sinks=4, window=1020)", 0.22, 0.25, 0.22, 0.62, "window", (0.97, 1.02)),
    Fake("snapkv(budget=0.25)", 0.25, None, 0.25, 0.03, "columns", (0.93, 1.03)),
    Fake("snapkv(budget=0.1)", 0.1, None, 0.1, 0.16, "columns", (0.93, 1.04)),
    Fake("h2o(budget=0.25)", 0.25, None, 0.25, 0.35, "columns", (0.8, 0.99)),
    Fake("quest(budget=0.1, page=16)", 1.0, None, 0.1, 0.05, "blocks", (0.99, 0.7), 0.06),
    Fake("minference", 1.0, 0.3, None, 0.02, "stripes", (0.9, 1.0)),
    Fake("minference+snapkv(budget=0.25)+quest(budget=0.1)", 0.25, 0.3, 0.1, 0.09, "stripes", (0.88, 0.75), 0.02),
    Fake("kivi(bits=2)", 0.17, None, None, 0.12, "all", (0.96, 0.6)),
    Fake("adakv(budget=0.25)", 0.25, None, 0.25, 0.01, "columns", (0.92, 1.0)),
    Fake("topk(keys=128)", 1.0, None, 0.06, 0.0, "topk", (0.99, 0.55), 0.0),
    Fake("random(budget=0.25)", 0.25, None, 0.25, 0.72, "columns", (0.97, 1.02)),
)
TASKS = ("needle", "needles", "dictionary", "copy", "variables", "perplexity")
LENGTHS = (2048, 4096, 8192, 16384)


@dataclass
class Made:
    """Builds results; `failures` names the cells (method, task, length) that failed, with their sentence."""

    methods: Sequence[Fake] = METHODS
    tasks: Sequence[str] = TASKS
    lengths: Sequence[int] = LENGTHS
    layers: Sequence[int] = ()
    heads: int = 6
    size: int = 128
    modes: Sequence[str] = ("aware",)
    failures: dict[tuple[str, str, int], str] = field(default_factory=dict)
    seed: int = 0

    def result(self) -> dict[str, Any]:
        rng = random.Random(self.seed)
        grid = [(m, t, n, mode) for mode in self.modes for t in self.tasks for n in self.lengths for m in self.methods]
        names = ",".join(method.spec for method in self.methods)
        return {
            "schema": "saccade.compare/1",
            "created": "2031-05-04T12:00:00",
            "command": f"saccade compare --methods '{names}' --tasks {','.join(self.tasks)} --samples 8",
            "environment": {
                "torch": "2.13.0",
                "transformers": "5.23.0",
                "python": "3.11",
                "device": "cpu",
                "device_name": "a plain CPU",
                "threads": 2,
            },
            "model": {
                "name": "pocket",
                "layers": 8,
                "query_heads": 6,
                "kv_heads": 2,
                "head_dim": 64,
                "parameters": 12_700_000,
            },
            "settings": {
                "tasks": list(self.tasks),
                "lengths": list(self.lengths),
                "samples": 8,
                "mode": self.modes[0],
                "seed": self.seed,
            },
            "rows": [self._row(rng, *place) for place in grid],
            "attention": self._attention() if self.layers else None,
        }

    def _row(self, rng: random.Random, method: Fake, task: str, length: int, mode: str) -> dict[str, Any]:
        bits, hard = task == "perplexity", task == "variables"
        dense_bytes = length * 2 * 2 * 64 * 8 * 4
        row: dict[str, Any] = {
            "method": method.spec,
            "slug": method.slug,
            "task": task,
            "length": length,
            "mode": mode,
            "status": "ok",
            "error": None,
            "samples": 8,
        }
        row |= {"unit": "bits" if bits else "accuracy", "discriminating": not hard, "depths": []}
        row["command"] = (
            f"saccade compare --model pocket --methods '{method.spec}' --tasks {task} --lengths {length} "
            f"--samples 8 --mode {mode} --seed {self.seed}"
        )
        identity = set(row)
        chance = (0.4 if hard else 0.98) * (1 - method.loss)
        depths = [[round(d, 2), sum(rng.random() < chance for _ in range(8)) / 8] for d in (0.1, 0.3, 0.5, 0.7, 0.9)]
        score = 0.58 * (1 + 0.4 * method.loss) if bits else sum(s for _, s in depths) / len(depths)
        slack = 0.02 if bits else 1.4 * math.sqrt(max(score * (1 - score), 0.02) / 8)
        row |= {
            "score": score,
            "low": max(0.0, score - slack),
            "high": score + slack if bits else min(1.0, score + slack),
        }
        row["depths"] = depths if task.startswith("needle") else []
        times = [length / 4.0 + rng.random() * 9, 9.0 + length / 4096]
        row |= {
            "prefill_density": method.prefill,
            "decode_density": method.decode,
            "kv_bytes": int(method.cache * dense_bytes),
            "index_bytes": int(method.index * dense_bytes),
        }
        row |= {"kv_bytes_dense": dense_bytes, "peak_bytes": 3 * dense_bytes}
        row |= {
            "prefill_ms": times[0] / method.speed[0],
            "decode_ms": times[1] / method.speed[1],
            "prefill_speedup": method.speed[0],
            "decode_speedup": method.speed[1],
        }
        error = [
            0.0 if method.slug == "dense" else method.loss * (0.4 + 0.1 * layer) * (0.9 + 0.2 * rng.random()) + 0.01
            for layer in range(8)
        ]
        row |= {"output_error": error, "mass": [1 - 0.8 * e for e in error]}
        failure = self.failures.get((method.spec, task, length))
        if failure is None:
            return row
        return row | dict.fromkeys(row.keys() - identity) | {"depths": [], "status": "failed", "error": failure}

    def _attention(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        layers = [
            {"layer": layer, "heads": [self._head(generator, head) for head in range(self.heads)]}
            for layer in self.layers
        ]
        return {
            "prompt": "def needle(x):\n    return x + 1\n" * 6,
            "length": 8 * self.size,
            "pool": 8,
            "layers": layers,
        }

    def _head(self, generator: torch.Generator, head: int) -> dict[str, Any]:
        n = self.size
        row, column = torch.arange(n)[:, None], torch.arange(n)[None, :]
        logits = torch.randn(n, n, generator=generator) - (row - column) * (0.02 + 0.03 * (head % 3))
        logits += (
            4.0 * (column == 0)
            + 2.5 * (torch.rand(1, n, generator=generator) > 0.93)
            + 2.0 * ((row - column) % 29 == head) * (head % 2)
        )
        future = column > row
        weights = logits.masked_fill(future, -math.inf).softmax(-1)
        shown = (1 + weights.clamp(min=1e-5).log10() / 5).masked_fill(future, 0.0)
        kept = {
            m.spec: self._selection(generator, m, weights).masked_fill(future, 0.0)
            for m in self.methods
            if m.slug != "dense"
        }
        visible = float((~future).sum())
        return {
            "head": head,
            "kv_head": head // 3,
            "map": _encoded(shown),
            "size": n,
            "selections": {name: _encoded(share) for name, share in kept.items()},
            "mass": {name: float((weights * share).sum(-1).mean()) for name, share in kept.items()},
            "density": {name: float(share.sum()) / visible for name, share in kept.items()},
        }

    def _selection(self, generator: torch.Generator, method: Fake, weights: torch.Tensor) -> torch.Tensor:
        """The share of each tile's keys that a method of this pattern keeps, (n, n) in [0, 1]."""
        n = self.size
        row, column = torch.arange(n)[:, None], torch.arange(n)[None, :]
        local = (row - column < n // 16) | (column == 0)
        if method.pattern == "all":
            return torch.ones(n, n)
        if method.pattern == "window":
            return ((row - column < n // 4) | (column == 0)).float()
        if method.pattern == "stripes":
            top = weights.sum(0).topk(n // 8).indices
            return ((column[..., None] == top).any(-1) | ((row - column) % 29 < 2) | local).float()
        if method.pattern == "blocks":
            pages = weights.reshape(n, n // 4, 4).amax(-1)
            chosen = torch.zeros_like(pages).scatter_(1, pages.topk(max(1, n // 32), dim=-1).indices, 1.0)
            return chosen.repeat_interleave(4, 1)
        if method.pattern == "topk":
            return (torch.rand(n, n, generator=generator) * weights * n / 2).clamp(max=1.0)
        shares = (torch.rand(1, n, generator=generator) * 8 * 2 * (method.decode or 0.25)).round() / 8
        return shares.clamp(max=1.0).expand(n, n).maximum(local.float())


def _encoded(share: torch.Tensor) -> str:
    return base64.b64encode((share.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy().tobytes()).decode()


def small() -> dict[str, Any]:
    """The result in fixtures/small.json: everything a page can show, in few cells."""
    methods = [METHODS[0], METHODS[2], METHODS[5], METHODS[-1]]
    sentence = "quest(budget=0.1, page=16) needs 16 tokens in a page, the layer holds 12: give a longer prompt"
    failures = {("quest(budget=0.1, page=16)", "needle", 2048): sentence}
    return Made(
        methods=methods,
        tasks=("needle", "variables", "perplexity"),
        lengths=(1024, 2048),
        layers=(0, 5),
        heads=2,
        size=16,
        failures=failures,
    ).result()


def large() -> dict[str, Any]:
    """12 methods, 6 tasks, 4 lengths, 8 layers of 6 heads at 128 x 128: the size that the page must still carry."""
    failures = {
        ("h2o(budget=0.25)", task, 16384): "out of memory: 1.6 GiB of scores for 16384 keys, give h2o a chunk"
        for task in TASKS
    }
    return Made(layers=range(8), failures=failures).result()


@pytest.fixture(scope="session")
def make_result() -> Callable[..., dict[str, Any]]:
    return lambda **fields: Made(**fields).result()


@pytest.fixture(scope="session")
def fake() -> type[Fake]:
    return Fake


@pytest.fixture
def small_result() -> dict[str, Any]:
    return json.loads((FIXTURES / "small.json").read_text())


@pytest.fixture(scope="session")
def small_maker() -> Callable[[], dict[str, Any]]:
    return small


@pytest.fixture(scope="session")
def large_result() -> dict[str, Any]:
    return large()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium. Where there is none, skip with the reason; in CI that is a failure."""
    names = [os.environ["CHROMIUM"]] if "CHROMIUM" in os.environ else ["chromium", "chromium-browser", "google-chrome"]
    path = next((found for found in map(shutil.which, names) if found), None)
    missing = pytest.fail if os.environ.get("CI") else pytest.skip
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: pip install playwright")
    if path is None:
        missing("no Chromium found: install chromium, or name one in CHROMIUM")
    quiet = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=quiet)
        yield browser
        browser.close()


if __name__ == "__main__":
    (FIXTURES / "small.json").write_text(json.dumps(small(), indent=1) + "\n")
