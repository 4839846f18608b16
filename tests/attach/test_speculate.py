"""speculate: the output is dense attention's own, whatever drafts; what is drafted leaves nothing behind."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.attach.speculate import _Run, _Sampler, speculate
from tests.contract.harness import greedy, llama, tokens
from tests.contract.models import tiny

DRAFT = "sparse-to-dense(budget=0.1, text=2)"


def sampler(seed: int | None, **options: Any) -> _Sampler:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return _Sampler(**{"generator": generator, "temperature": 1.0, "top_k": None, "top_p": None, **options})


# -- greedy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [DRAFT, "quest(page_size=4, budget=12, dense_layers=0)", "tidaldecode(budget=6, start=0)"])
@pytest.mark.parametrize("gamma", [1, 4])
def test_greedy_output_is_dense_whatever_drafts(spec: str, gamma: int) -> None:
    ids = tokens(2, 60)
    found = speculate(llama(), ids, spec, max_new_tokens=21, gamma=gamma)
    assert torch.equal(found.tokens, greedy(llama(), ids, 21))
    assert sum(found.drafted) and found.acceptance is not None and found.passes == len(found.accepted)


def test_rows_padded_on_the_left_write_what_they_write_alone() -> None:
    ids, short = tokens(2, 40), tokens(1, 27, seed=5)
    ids[1, :13], ids[1, 13:] = 0, short[0]
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    both = speculate(llama(), ids, "sparse-to-dense(budget=0.2, text=4)", max_new_tokens=15, gamma=3, attention_mask=mask).tokens
    assert torch.equal(both[:1, 40:], greedy(llama(), ids[:1], 15)[:, 40:])
    assert torch.equal(both[1:, 40:], greedy(llama(), short, 15)[:, 27:])


def test_rows_end_on_their_own_and_the_output_when_all_have() -> None:
    ids = tokens(2, 30)
    dense = greedy(llama(), ids, 24)[:, 30:]
    end = int(dense[0, 5])
    assert end not in dense[0, :5] and end not in dense[1, :7]
    found = speculate(llama(), ids, DRAFT, max_new_tokens=24, gamma=4, eos_token_id=[end, 500]).tokens[:, 30:]
    assert torch.equal(found[0, :6], dense[0, :6]) and not bool(found[0, 6:].any())
    stop = (dense[1] == end).nonzero()
    last = int(stop[0]) + 1 if len(stop) else 24
    assert found.shape[1] == last and torch.equal(found[1], dense[1, :last])


@torch.no_grad()
def test_the_cache_holds_dense_keys_only() -> None:
    """Also those of accepted drafts, which the sparse model had computed first."""
    model, ids = llama(), tokens(1, 60)
    run = _Run(model, ids, None, sampler(None), torch.tensor([]), 30)
    with saccade.attach(model, decode="sparse-to-dense(budget=0.1, text=2)") as handle:
        run.read_prompt({})
        for _ in range(4):
            run.round(handle, 4)
    plain = DynamicCache(config=model.config)
    model(run.tokens()[:, :-1], past_key_values=plain)
    assert run.cache.get_seq_length() == plain.get_seq_length() == 60 + len(run.written) - 1
    for own, dense in zip(run.cache.layers, plain.layers, strict=True):
        assert float((own.keys - dense.keys).abs().max()) < 1e-12 and float((own.values - dense.values).abs().max()) < 1e-12


# -- sampling -----------------------------------------------------------------------------------------------------------


class Table(_Run):
    """A chain of three tokens in place of a model: single steps follow `draft (3, 3)`, longer calls `exact (3, 3)`."""

    draft: Tensor
    exact: Tensor

    def _feed(self, ids: Tensor, **options: Any) -> Tensor:
        return (self.draft if ids.shape[1] == 1 and self.written else self.exact)[ids].log()

    def _take_back(self, count: int) -> None:
        pass


def test_sampled_output_follows_the_dense_model() -> None:
    """Three tokens written by two rows in rounds of two drafts: chi-square over all 27 outcomes."""
    g = torch.Generator().manual_seed(5)
    exact, draft = (torch.rand(3, 3, generator=g, dtype=torch.float64) + 0.1 for _ in range(2))
    exact, draft = (x / x.sum(-1, keepdim=True) for x in (exact, draft))
    assert float((exact - draft).abs().max()) > 0.2
    counts, one, accepted = torch.zeros(27), sampler(3), []
    for _ in range(800):
        run = Table(llama(), torch.zeros(2, 1, dtype=torch.long), None, one, torch.tensor([]), 4)
        run.exact, run.draft = exact, draft
        run.read_prompt({})
        while len(run.written) < 3:
            run.round(SimpleNamespace(densely=nullcontext), min(2, run.room - 1))
        accepted += run.accepted
        a, b, c = torch.stack(run.written[:3])
        counts.index_add_(0, a * 9 + b * 3 + c, torch.ones(2))
    expected = (exact[0][:, None, None] * exact[:, :, None] * exact[None]).flatten() * counts.sum()
    chi_square = float(((counts - expected).square() / expected).sum())
    assert chi_square < 54.05, chi_square  # the 0.999 quantile with 26 degrees of freedom
    assert {min(rows) for rows in accepted} == {0, 1, 2}


def test_sampling_on_a_model_with_its_options() -> None:
    """The second token of 3000 equal rows, drawn from the four likeliest at temperature 0.7."""
    model, ids = tiny("llama", torch.float32), tokens(1, 20)
    with torch.no_grad():
        first = (model(ids).logits[0, -1].double() / 0.7).topk(4)
        likely = torch.cat([ids.expand(4, -1), first.indices[:, None]], 1)
        second = (model(likely).logits[:, -1].double() / 0.7).topk(4, dim=-1)
    found = speculate(
        model, ids.expand(3000, -1), "sparse-to-dense(budget=0.2, text=2)", max_new_tokens=3, gamma=1, do_sample=True,
        temperature=0.7, top_k=4, seed=2,
    ).tokens  # fmt: skip
    expected = torch.zeros(97, 97, dtype=torch.float64)
    expected[first.indices[:, None], second.indices] = first.values.softmax(-1)[:, None] * second.values.softmax(-1)
    counts = torch.bincount(found[:, 20] * 97 + found[:, 21], minlength=97 * 97).double()
    there = expected.flatten() > 0
    assert not bool(counts[~there].any())
    wanted = 3000 * expected.flatten()[there]
    chi_square = float(((counts[there] - wanted).square() / wanted).sum())
    assert chi_square < 37.7, chi_square  # the 0.999 quantile with 15 degrees of freedom
    once, again = (speculate(model, ids, DRAFT, max_new_tokens=8, gamma=3, do_sample=True, seed=4).tokens for _ in range(2))
    assert torch.equal(once, again)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([[0.5, 0.15, 0.05, 0.3]]).log()
    assert torch.allclose(sampler(0, top_p=0.7).probabilities(logits), torch.tensor([[0.625, 0, 0, 0.375]]))
    assert torch.allclose(sampler(0, top_p=0.81).probabilities(logits), torch.tensor([[0.5, 0.15, 0, 0.3]]) / 0.95)


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": "snapkv"}, "snapkv acts on the prompt or the cache"),
        ({"spec": "shadowkv"}, "shadowkv does not keep the cache whole"),
        ({"gamma": 0}, "gamma=0: expected a whole number of at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"do_sample": True, "temperature": 0}, "temperature=0: give a number above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 0}, "top_k=0"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "pad on the left"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"spec": "sparse-to-dense", "max_new_tokens": 4, **options}
    with pytest.raises(ValueError, match=message):
        speculate(llama(), tokens(1, 3), given.pop("spec"), **given)


def test_refuses_models_that_cannot_take_tokens_back() -> None:
    with pytest.raises(ValueError, match="Gemma3ForCausalLM has layers without full attention"):
        speculate(tiny("gemma3"), tokens(1, 30), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"input_ids torch.float32 \(1, 3\): expected int64"):
        speculate(llama(), torch.ones(1, 3), max_new_tokens=4)
