"""GemFilter (gemfilter, 2409.17422): the choice, the cost of two passes, positions and places, and needles on the pocket model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.contract.harness import error, greedy, llama, logits, tokens
from tests.contract.models import tiny
from tests.methods.cache.needles import BYTE, pocket, prompts
from tests.methods.prefill.planted import context
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import saccade
from saccade.attach import capture
from saccade.core import Mass
from saccade.methods import build_combination
from saccade.methods.cache.gemfilter import GemFilter


def chosen_by_hand(model: PreTrainedModel, ids: Tensor, layer: int, count: int, kernel: int) -> Tensor:
    """The tokens of each row, from the captured queries and keys of a dense run."""
    with capture(model) as layers, torch.no_grad():
        model(ids, use_cache=False)
    q, k = layers[layer].q, layers[layer].k.repeat_interleave(3, 1)
    scores = (k @ q[:, :, -1:].mT).squeeze(-1).sum(1)
    pooled = F.avg_pool1d(scores[:, None], kernel, 1, kernel // 2)[:, 0]
    pooled[:, -1] = torch.inf
    return pooled.topk(count).indices.sort().values


# -- the choice and the second pass ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "kernel"), [(0, 1), (1, 5)])
def test_runs_the_chosen_tokens_as_a_prompt_of_their_own(layer: int, kernel: int) -> None:
    model, ids = llama(), tokens(2, 70)
    picked = chosen_by_hand(model, ids, layer, 20, kernel)
    short = logits(model, ids.gather(1, picked))
    with saccade.attach(model, prefill=f"gemfilter(budget=20, at={layer}, kernel={kernel})") as handle:
        got = logits(model, ids)
        assert handle.chosen is not None and torch.equal(torch.stack(handle.chosen.places), picked)
    assert error(got.gather(1, picked.unsqueeze(-1).expand(-1, -1, got.shape[-1])), short) < 1e-9
    left_out = torch.ones(2, 70, dtype=torch.bool).scatter(1, picked, False)
    assert bool((got[left_out] == 0).all()) and bool((got[:, -1] != 0).any())


def test_generation_goes_on_from_the_short_prompt() -> None:
    model, ids = llama(), tokens(2, 70)
    short = ids.gather(1, chosen_by_hand(model, ids, 1, 20, 5))
    expected = greedy(model, short, 12)[:, 20:]
    with saccade.attach(model, prefill="gemfilter(budget=20, at=1)") as handle:
        c = DynamicCache(config=model.config)
        got = greedy(model, ids, 12, past_key_values=c)
        stats = handle.stats()
    assert torch.equal(got, torch.cat([ids, expected], 1))
    # n + 11 tokens seen, 20 + 11 stored, at their true places
    assert c.get_seq_length() == 81 and stats.tokens_seen == 81 and stats.kept == [[31, 31]] * 2
    positions = c.layers[0].positions()[:, 0].long()
    assert torch.equal(positions[:, :20], chosen_by_hand(model, ids, 1, 20, 5)) and positions[0, 20:].tolist() == [*range(70, 81)]


def test_all_tokens_stay_where_they_fit() -> None:
    model, ids = llama(), tokens(2, 40)
    dense = greedy(model, ids, 8)
    for budget in (40, 1000, 1.0):
        with saccade.attach(model, prefill=GemFilter(budget=budget, at=1)) as handle:
            assert torch.equal(greedy(model, ids, 8), dense) and handle.chosen is None
            assert handle.stats().prefill_density == 1


def test_cost_is_the_share_of_layers_that_read_everything() -> None:
    model, n = tiny("gpt2"), 500
    layers = model.config.num_hidden_layers
    for at in range(layers):
        with saccade.attach(model, prefill=f"gemfilter(budget=10, at={at})") as handle, torch.no_grad():
            model(tokens(1, n), use_cache=True)
            density = handle.stats().prefill_density
        assert density == pytest.approx((at + 2 / n) / layers + (10 / n) ** 2, abs=2e-3)
    calls = []
    with saccade.attach(model, prefill="gemfilter(budget=10, at=1)"), torch.no_grad():
        hooks = [block.mlp.register_forward_hook(lambda m, a, out: calls.append(out.shape[1])) for block in model.transformer.h]
        model(tokens(1, n), use_cache=True)
    for hook in hooks:
        hook.remove()
    assert calls == [n, 10, 10], "the layer that chooses and those after it never see the whole prompt"


def test_peak_of_the_cache_is_the_short_prompt() -> None:
    model, ids = llama(), tokens(1, 400)
    with saccade.attach(model, prefill="gemfilter(budget=50, at=1)") as handle, torch.no_grad():
        c = model(ids, use_cache=True).past_key_values
        held = handle.stats().kv_bytes
        assert c.layers[0].keys.shape[2] == 50
    with saccade.attach(model) as handle, torch.no_grad():
        model(ids, use_cache=True)
        # growing buffers have room for 64 more entries
        assert held == (50 + 64) * 2 * 2 * 2 * 16 * 8 < handle.stats().kv_bytes / 3.5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_choose_among_their_own(side: str) -> None:
    model, ids, short = llama(), tokens(1, 60), tokens(1, 31, seed=5)
    gap = torch.zeros(1, 29, dtype=torch.long)
    batch = torch.cat([ids, torch.cat([gap, short] if side == "left" else [short, gap], 1)])
    mask = (batch > 0).long()
    with saccade.attach(model, prefill="gemfilter(budget=0.5, at=1)") as handle:
        both = logits(model, batch, mask=mask)
        assert handle.chosen is not None
        assert [len(row) for row in handle.chosen.places] == [30, 16] and bool(mask[1, handle.chosen.places[1]].all())
        alone = logits(model, short)
    assert error(both[1:][:, mask[1].bool()], alone) < 1e-6


def test_guesses_behind_the_prompt_stay_and_do_not_choose() -> None:
    model, ids = llama(), tokens(1, 60)
    with saccade.attach(model, prefill="gemfilter(budget=20, at=1)") as handle, torch.no_grad():
        model(ids, use_cache=True)
        assert handle.chosen is not None
        alone = handle.chosen.places[0]
        c = DynamicCache(config=model.config)
        out = model(torch.cat([ids, tokens(1, 4, seed=8)], 1), past_key_values=c, logits_to_keep=5)
        assert handle.chosen.places[0].tolist() == [*alone.tolist(), 60, 61, 62, 63] and out.logits.shape[1] == 5
        c.crop(-4)
        again = model(tokens(1, 4, seed=8), past_key_values=c).logits
        assert error(again, out.logits[:, 1:]) < 1e-6
    repeated = tokens(1, 20).repeat(1, 4)
    with saccade.attach(model, prefill="gemfilter(budget=30, at=1)"):
        assert torch.equal(greedy(model, repeated, 16, prompt_lookup_num_tokens=4), greedy(model, repeated, 16))


def test_later_calls_follow_without_being_told_positions(tmp_path) -> None:
    model, ids, more = llama(), tokens(2, 60), tokens(2, 9, seed=2)
    short = ids.gather(1, chosen_by_hand(model, ids, 1, 15, 5))
    expected = logits(model, torch.cat([short, more], 1))[:, 15:]
    with saccade.attach(model, prefill="gemfilter(budget=15, at=1)") as handle, torch.no_grad():
        c = model(ids, use_cache=True).past_key_values
        path, second = handle.save(tmp_path / "cache.safetensors"), copy.deepcopy(c)
        assert error(model(more, past_key_values=c).logits.double(), expected) < 1e-6
        second.reorder_cache(torch.tensor([1, 0]))
        turned = model(more[[1, 0]], past_key_values=second).logits
        assert error(turned[[1, 0]].double(), expected) < 1e-6
        with pytest.raises(ValueError, match="begin again with a new cache"):
            c.crop(-20)
            model(more, past_key_values=c)
    # the cache knows how its prompt was run, whoever goes on with it
    loaded = saccade.load_cache(path, model)
    with saccade.attach(model), torch.no_grad():
        assert error(model(more, past_key_values=loaded).logits.double(), expected) < 1e-6


def test_with_other_methods() -> None:
    model, ids = llama(), tokens(1, 200)
    with saccade.attach(model, **build_combination("gemfilter(budget=100, at=1)+snapkv(budget=40, window=8)")) as handle:
        greedy(model, ids, 6)
        assert handle.stats().kept == [[45, 45]] * 2
    with saccade.attach(model, prefill="gemfilter(budget=100, at=1)", decode="quest(budget=16, page_size=4, dense_layers=0)") as handle:
        greedy(model, ids, 6)
        density = handle.stats().decode_density
        assert density is not None and density < 0.3
    with pytest.raises(ValueError, match="two prefill methods"):
        build_combination("gemfilter+minference")


def test_nothing_is_left_behind() -> None:
    model, ids = llama(), tokens(1, 60)
    dense = logits(model, ids)
    with saccade.attach(model, prefill="gemfilter(budget=10, at=1)"):
        logits(model, ids)
    assert not model._forward_hooks and not model._forward_pre_hooks and error(logits(model, ids), dense) == 0


# -- the pocket model ------------------------------------------------------------------------------------------------------


def needles_found(spec: str, ids: Tensor, answers: list[bytes]) -> tuple[int, int]:
    """Right answers, and how many rows have their whole answer among the chosen tokens of the context."""
    model = pocket()
    with saccade.attach(model, prefill=spec) as handle:
        out = model.generate(ids, max_new_tokens=max(map(len, answers)) + 1, do_sample=False, pad_token_id=0, eos_token_id=2)
        assert handle.chosen is not None
        shown = [bytes(max(0, int(ids[row, i]) - BYTE) for i in places) for row, places in enumerate(handle.chosen.places)]
    texts = [bytes(max(0, token - BYTE) for token in row) for row in out[:, ids.shape[1] :].tolist()]
    right = sum(text.startswith(answer + b".") for text, answer in zip(texts, answers, strict=True))
    return right, sum(answer in text for answer, text in zip(answers, shown, strict=True))


VOTES = "kernel=41, recent=96, queries=32, weights='softmax'"


def test_needles_at_an_eighth_of_the_prompt() -> None:
    ids, answers = prompts(1536, (0.15, 0.6), seed=3)
    assert needles_found(f"gemfilter(budget=0.125, at=5, {VOTES})", ids, answers) == (2, 2)
    # below the layers that retrieve, nothing points at the needle
    assert needles_found(f"gemfilter(budget=0.125, at=1, {VOTES})", ids, answers) == (0, 0)


def test_raw_products_of_one_query_find_a_planted_key() -> None:
    """Keys that agree with the last query in every head are what the paper's score finds, whichever head asks."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 60, 8, generator=generator), 0.3 * torch.randn(2, 2, 60, 8, generator=generator)
    for row, place in enumerate((10, 41)):
        k[row, :, place] += q[row, :, -1].unflatten(0, (2, 2)).mean(1)
    ctx = context(q, k, k)
    for weights, kernel in (("raw", 1), ("raw", 5), ("softmax", 5)):
        ids = GemFilter(budget=8, kernel=kernel, weights=weights).choose(ctx, q, k)  # pyright: ignore[reportArgumentType]
        assert ids.shape == (2, 8) and 10 in ids[0].tolist() and 41 in ids[1].tolist() and ids[:, -1].tolist() == [59, 59]
        assert kernel == 1 or {9, 10, 11} <= set(ids[0].tolist()), "neighbours of a peak come along"


# -- refusals --------------------------------------------------------------------------------------------------------------


WRONG = [{"at": -1}, {"at": 1.5}, {"at": True}, {"kernel": 4}, {"kernel": 0}, {"recent": 0}, {"queries": 0}, {"weights": "mean"}]


@pytest.mark.parametrize("given", WRONG, ids=str)
def test_wrong_fields_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"gemfilter\\({next(iter(given))}="):
        GemFilter(**given)  # pyright: ignore[reportArgumentType]


def test_what_a_short_prompt_cannot_serve_is_refused() -> None:
    model, ids = llama(), tokens(1, 60)
    with pytest.raises(ValueError, match="fixed number of tokens"):
        GemFilter(budget=Mass(0.9))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="give a lower one"):
        saccade.attach(model, prefill="gemfilter(at=2)")
    with pytest.raises(ValueError, match="pass it as prefill="):
        saccade.attach(model, cache="gemfilter")
    with pytest.raises(ValueError, match="shortens a model's prompt"):
        saccade.attention(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), method="gemfilter")
    with saccade.attach(model, prefill="gemfilter(budget=10, at=1)"):
        for given, match in (({"labels": ids}, "labels"), ({"output_hidden_states": True}, "output_hidden_states")):
            with pytest.raises(ValueError, match=f"which {match} can't follow"):
                model(ids, **given)
