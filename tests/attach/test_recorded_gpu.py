"""attach(graph=) with CUDA graphs: what `test_recorded` shows without a GPU holds with one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import saccade
from saccade.attach import Session, recorded
from saccade.methods import build
from tests.attach.test_recorded import plain_steps
from tests.contract.harness import greedy, tokens
from tests.contract.models import tiny

pytestmark = pytest.mark.gpu

SPECS = [
    "", "quest(page_size=4, budget=12, dense_layers=0)", "quest(page_size=4, budget=12, dense_layers=0, reduce='group_max')",
    "tidaldecode(budget=8, start=0)", "less-is-more(budget=16, start=0)", "loki(dims=0.5, budget=12)",
    "double-sparsity(channels=0.5, budget=12, dense_layers=0)", "snapkv(budget=0.5, window=8)", "streaming-llm(sinks=2, window=20)",
    "h2o(budget=24, recent=0.5)", "zipcache(interval=64)", "kvquant",
]  # fmt: skip
SIZE = 8


def model() -> PreTrainedModel:
    return copy.deepcopy(tiny("llama", torch.float32)).to("cuda")


def attached(owner: PreTrainedModel, spec: str, graph: int | None) -> Session:
    how: dict[str, Any] = {}
    if spec:
        method = build(spec)
        how[method.info.phase] = method
        if "calibration" in method.info.needs:
            how["plan"] = saccade.calibrate(owner, method, [tokens(2, 96, seed=9).cuda()])
    return saccade.attach(owner, **how, graph=graph)


@torch.no_grad()
def steps(owner: PreTrainedModel, ids: Tensor, prompt: int) -> Tensor:
    cache = DynamicCache(config=owner.config)
    owner(ids[:, :prompt], past_key_values=cache)
    return torch.cat([owner(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, ids.shape[1])], dim=1)


@pytest.mark.parametrize("spec", SPECS)
def test_graphs_give_what_the_same_steps_give_one_by_one(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, ids = model(), tokens(2, 120).cuda()
    with attached(owner, spec, SIZE) as handle:
        assert handle.steps is not None
        found = steps(owner, ids, 80)
        assert handle.steps.replayed >= 24 and handle.steps.recorded >= 4
    monkeypatch.setattr(recorded._Recording, "step", plain_steps)
    with attached(owner, spec, SIZE):
        wanted = steps(owner, ids, 80)
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_generate_with_graphs_writes_dense_tokens() -> None:
    owner, ids = model(), tokens(2, 30).cuda()
    wanted = greedy(owner, ids, 40)
    with saccade.attach(owner, graph=SIZE) as handle:
        assert torch.equal(greedy(owner, ids, 40), wanted)
    assert handle.steps is not None and handle.steps.replayed >= 20


def test_a_recording_follows_one_that_is_gone() -> None:
    record = recorded.CudaGraphs(torch.device("cuda"))
    x = torch.zeros(3, device="cuda")
    for i in range(3):
        replay = record(lambda i=i: x + i)
        assert replay().tolist() == [i] * 3
        del replay
