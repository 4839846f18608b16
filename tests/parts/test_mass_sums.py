"""Column sums of the attention map, and the queries they are made from."""

from __future__ import annotations

import pytest
import torch
from tests.cache.single import random_qkv
from torch import Tensor

from saccade.parts import mass_sums as module
from saccade.parts.mass_sums import mass_sums
from saccade.parts.probabilities import probabilities
from saccade.parts.recent_queries import recall, remember


def whole_map(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Causal weights `(B, Hq, m, n)`; the queries are the newest."""
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    m, n = logits.shape[2:]
    return logits.masked_fill(torch.arange(n) > torch.arange(n - m, n)[:, None], -torch.inf).softmax(-1)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("m", [1, 7, 50])
def test_probabilities_equal_the_map(m: int, softcap: float | None) -> None:
    q, k, _ = random_qkv(50, batch=2)
    got = probabilities(q[:, :, -m:], k, scale=0.4, softcap=softcap)
    assert got.shape == (2, 2, 2, m, 50)
    assert (got.flatten(1, 2) - whole_map(q[:, :, -m:], k, 0.4, softcap)).abs().max() < 1e-12


def test_probabilities_of_half_precision_are_float32() -> None:
    q, k, _ = (x.bfloat16() for x in random_qkv(20))
    assert probabilities(q, k, scale=1.0).dtype == torch.float32


@pytest.mark.parametrize("pairs", [1, 700, 1 << 22])
@pytest.mark.parametrize("behind", [0, 6])
def test_sums_do_not_depend_on_the_runs_of_rows(pairs: int, behind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAIRS", pairs)
    q, k, _ = random_qkv(60, batch=2)
    got = mass_sums(q[:, :, 20 : 60 - behind], k, scale=0.4, behind=behind)
    expected = whole_map(q, k, 0.4)[:, :, 20 : 60 - behind].unflatten(1, (2, 2)).sum((2, 3))
    assert (got - expected).abs().max() < 1e-12
    # each query hands out one unit of attention
    assert (got.sum(-1) - 2 * (40 - behind)).abs().max() < 1e-9


@pytest.mark.parametrize("pairs", [1, 1 << 22])
def test_sums_over_heads_of_unequal_length(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAIRS", pairs)
    q, k, _ = random_qkv(60)
    valid = torch.ones(1, 2, 60, dtype=torch.bool)
    valid[:, 1, 48:] = False
    holes = k.masked_fill(~valid.unsqueeze(-1), 1e3)
    got = mass_sums(q[:, :, -10:], holes, scale=0.4, valid=valid, behind=0)
    first = mass_sums(q[:, :2, -10:], k[:, :1], scale=0.4)
    second = mass_sums(q[:, 2:, -10:], k[:, 1:, :48], scale=0.4)
    assert (got[:, :1] - first).abs().max() < 1e-12
    assert (got[:, 1:, :48] - second).abs().max() < 1e-12 and (got[:, 1:, 48:] == 0).all()


def test_queries_are_remembered_across_calls_and_taken_back() -> None:
    q, _, _ = random_qkv(40)
    state: dict[str, object] = {}
    assert recall(state, 0) is None
    for begin, end in ((0, 25), (25, 31), (31, 32), (32, 40)):
        remember(state, q[:, :, begin:end], end, keep=12)
        kept = recall(state, end)
        assert kept is not None and torch.equal(kept, q[:, :, max(0, end - 12) : end])
    kept = recall(state, 35)
    assert kept is not None and torch.equal(kept, q[:, :, 28:35])
    assert recall(state, 28) is None
    # the 5 newest were taken back, 2 others came
    remember(state, q[:, :, :2], 37, keep=12)
    kept = recall(state, 37)
    assert kept is not None and torch.equal(kept, torch.cat([q[:, :, 28:35], q[:, :, :2]], 2))


def test_remembered_queries_do_not_hold_the_whole_prompt() -> None:
    q = torch.randn(1, 4, 1000, 8)
    state: dict[str, Tensor] = {}
    remember(state, q, 1000, keep=16)
    assert state["queries"].untyped_storage().nbytes() == 4 * 16 * 8 * 4
