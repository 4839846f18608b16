"""attach(graph=): a step that is recorded and repeated gives what the steps one by one give, and the cache knows of every token."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.attach import recorded
from saccade.attach.session import Session
from tests.attach.frozen import Frozen
from tests.contract.harness import METHODS, error, greedy, info, llama, opened, plan, sparse, tokens

RECORDABLE = sorted(slug for slug in METHODS if info(slug).phase == "decode" and info(slug).recordable)
SIZE = 6


def attached(graph: int = SIZE, **methods: Any) -> Session:
    plans = [plan("llama", spec, torch.float64) for spec in methods.values() if isinstance(spec, str)]
    handle = saccade.attach(llama(), **methods, plan=[p for p in plans if p is not None], graph=graph)
    assert handle.steps is not None
    handle.steps._recorder = Frozen(handle)
    return handle


@torch.no_grad()
def steps(ids: Tensor, prompt: int, cache: DynamicCache | None = None) -> Tensor:
    """Logits `(B, m, vocab)` of the tokens after the prompt, fed one by one."""
    model, cache = llama(), cache or DynamicCache(config=llama().config)
    model(ids[:, :prompt], past_key_values=cache)
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, ids.shape[1])], dim=1)


def plain_steps(self: Any, ids: Tensor, positions: Tensor | None) -> Any:
    """A recording whose every step runs in full."""
    self.clock.set(self.steps)
    self.ids.copy_(ids)
    self.positions.fill_(next(iter(self.layers.values())).seen)
    self.steps += 1
    return self._run()


# -- what comes out ------------------------------------------------------------------------------------------------------


def test_dense_steps_are_recorded_and_change_nothing() -> None:
    ids = tokens(2, 60)
    dense = steps(ids, 40)
    with attached() as handle:
        cache = DynamicCache(config=llama().config)
        found = steps(ids, 40, cache)
        stats = handle.stats()
    assert error(found, dense) < 1e-12
    assert handle.steps is not None
    # windows of 6: one as it is, one recorded, four repeated
    assert (handle.steps.plain, handle.steps.recorded, handle.steps.replayed) == (4, 4, 12)
    assert stats.decode_density == pytest.approx(1.0) and stats.tokens_seen == 60 and stats.kept == [[60, 60]] * 2
    assert cache.layers[0].positions()[0, 0].tolist() == list(range(60))
    assert "forward" not in vars(llama())


@pytest.mark.parametrize("slug", RECORDABLE)
def test_open_methods_equal_dense(slug: str) -> None:
    ids = tokens(1, 52)
    with attached(decode=opened(slug)) as handle:
        found = steps(ids, 36)
    assert error(found, steps(ids, 36)) < 1e-10
    assert handle.steps is not None and handle.steps.replayed


@pytest.mark.parametrize("slug", RECORDABLE)
def test_repeated_steps_equal_steps_one_by_one(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(2, 60)
    with attached(decode=sparse(slug)) as handle:
        found = steps(ids, 40)
        repeated = handle.stats().decode_density
    monkeypatch.setattr(recorded._Recording, "step", plain_steps)
    with attached(decode=sparse(slug)) as handle:
        wanted = steps(ids, 40)
        density = handle.stats().decode_density
    assert error(found, wanted) < 1e-12
    assert repeated == pytest.approx(density) and density is not None and density < 0.75


def test_a_method_chooses_among_what_was_there_before_the_window() -> None:
    from saccade.methods.decode.quest import Quest

    seen: list[int] = []

    class Watched(Quest):
        def select(self, ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
            if ctx.layer == 0:
                seen.append(k.shape[2])
            return super().select(ctx, q, k, v)

    with attached(decode=Watched(page_size=4, budget=12, dense_layers=0)):
        steps(tokens(1, 50), 40)
    assert sorted(set(seen)) == [40, 46]


def test_a_method_that_attends_by_itself_is_found_out() -> None:
    from saccade.methods.decode.quest import Quest

    class Alone(Quest):
        def attend(self, ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return q

    alone = Alone(page_size=4, budget=12, dense_layers=0)
    with attached(decode=alone), pytest.raises(ValueError, match=r"not attended through ctx\.attend"):
        steps(tokens(1, 50), 40)


# -- cache policies ------------------------------------------------------------------------------------------------------


def test_a_policy_that_acts_on_the_prompt_gives_the_same_tokens() -> None:
    ids, spec = tokens(2, 60), "l2-norm(budget=0.5)"
    with saccade.attach(llama(), cache=spec):
        wanted = steps(ids, 40)
    with attached(cache=spec) as handle:
        found = steps(ids, 40)
    assert error(found, wanted) < 1e-12
    assert handle.steps is not None and handle.steps.replayed


@pytest.mark.parametrize("spec", ["streaming-llm(sinks=2, window=10)", "h2o(budget=14, recent=0.5)", "zipcache(interval=8)"])
def test_policies_act_when_a_recording_ends(spec: str) -> None:
    with attached(cache=spec) as handle:
        steps(tokens(1, 90), 40)
        held = max(max(layer) for layer in handle.stats().kept)
    assert handle.steps is not None and handle.steps.replayed >= 24
    assert held <= (90 if "zipcache" in spec else 14 + SIZE)


def test_a_policy_sees_the_queries_of_all_steps() -> None:
    from saccade.methods.cache.h2o import H2O

    counts: list[int] = []

    class Watched(H2O):
        def watch(self, ctx: Any, kv: Any, q: Tensor) -> None:
            if ctx.layer == 0:
                counts.append(q.shape[2])
            super().watch(ctx, kv, q)

    with attached(cache=Watched(budget=200)):
        steps(tokens(1, 60), 40)
    # the prompt, the token that ends it, three windows and what was left
    assert counts == [40, 6, 6, 6, 2] or counts == [40, 1, 6, 6, 6, 1]


# -- a cache that is changed between steps -----------------------------------------------------------------------------------


@torch.no_grad()
def test_tokens_that_are_taken_back_begin_a_new_recording() -> None:
    ids = tokens(1, 60)
    dense = steps(ids, 40)
    with attached():
        cache = DynamicCache(config=llama().config)
        steps(ids[:, :55], 40, cache)
        cache.crop(-5)
        again = torch.cat([llama()(ids[:, i : i + 1], past_key_values=cache).logits for i in range(50, 60)], dim=1)
    assert error(again, dense[:, 10:]) < 1e-12


@torch.no_grad()
def test_rows_can_change_places() -> None:
    ids = tokens(2, 60)
    with attached():
        cache = DynamicCache(config=llama().config)
        steps(ids[:, :52], 40, cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        found = torch.cat([llama()(ids.flip(0)[:, i : i + 1], past_key_values=cache).logits for i in range(52, 60)], dim=1)
    assert error(found, steps(ids, 40).flip(0)[:, 12:]) < 1e-12


@torch.no_grad()
def test_a_later_turn_goes_on_after_recorded_steps() -> None:
    ids = tokens(1, 80)
    with attached(decode=opened("quest")):
        cache = DynamicCache(config=llama().config)
        steps(ids[:, :51], 40, cache)
        llama()(ids[:, 51:70], past_key_values=cache)
        found = torch.cat([llama()(ids[:, i : i + 1], past_key_values=cache).logits for i in range(70, 80)], dim=1)
    assert error(found, steps(ids, 40)[:, 30:]) < 1e-10


def test_generate_writes_what_it_writes_without() -> None:
    ids = tokens(2, 30)
    with attached() as handle:
        found = greedy(llama(), ids, 20)
    assert torch.equal(found, greedy(llama(), ids, 20))
    assert handle.steps is not None and handle.steps.replayed


@torch.no_grad()
def test_results_do_not_change_with_the_next_step() -> None:
    model, ids, cache = llama(), tokens(1, 50), DynamicCache(config=llama().config)
    with attached():
        model(ids[:, :40], past_key_values=cache)
        results = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 50)]
        kept = [x.clone() for x in results]
        model(ids[:, :1], past_key_values=cache)
    assert all(torch.equal(a, b) for a, b in zip(results, kept, strict=True))


# -- what is not recorded, and what is refused ---------------------------------------------------------------------------------


def test_padded_rows_run_as_before_and_say_so_once() -> None:
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    wanted = greedy(llama(), ids, 12, attention_mask=mask)
    with attached() as handle, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = greedy(llama(), ids, 12, attention_mask=mask)
    assert torch.equal(found, wanted)
    assert handle.steps is not None and not handle.steps.recorded
    assert sum("steps are not recorded: rows are run one by one" in str(w.message) for w in caught) == 1


def test_other_reasons_are_told() -> None:
    ids = tokens(1, 30)
    with saccade.attach(llama(), graph=8), pytest.warns(UserWarning, match="CUDA graphs need a CUDA device"):
        greedy(llama(), ids, 4)
    model = llama()
    with attached(), pytest.warns(UserWarning, match="gradients are on"):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        for _ in range(2):
            model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_step_that_fails_to_be_recorded_runs_as_before() -> None:
    ids = tokens(2, 60)

    def fails(step: Any) -> Any:
        step()
        raise RuntimeError("operation not permitted when stream is capturing")

    with attached() as handle, pytest.warns(UserWarning, match="one could not be .operation not permitted"):
        assert handle.steps is not None
        handle.steps._recorder = fails
        cache = DynamicCache(config=llama().config)
        found = steps(ids, 40, cache)
    assert error(found, steps(ids, 40)) < 1e-12 and cache.get_seq_length() == 60
    assert cache.layers[0].positions()[0, 0].tolist() == list(range(60))


def test_what_can_not_be_recorded_is_refused() -> None:
    for size in (3, 0, True, 2.5):
        with pytest.raises(ValueError, match="not a number of tokens that one recording serves"):
            saccade.attach(llama(), graph=size)
    slug = "top-theta"
    with pytest.raises(ValueError, match="steps of top-theta can't be recorded as a CUDA graph"):
        saccade.attach(llama(), decode=sparse(slug), plan=plan("llama", sparse(slug), torch.float64), graph=8)
    with pytest.raises(ValueError, match="quest over entries that zipcache encodes waits for the device"):
        saccade.attach(llama(), decode="quest", cache="zipcache", graph=8)
