"""One test for each known trap of transformers >= 5 (DESIGN, "The KVLayer, exactly")."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import saccade
from saccade.attach import capture
from saccade.cache import KVLayer
from saccade.core import CachePolicy, Info, LayerContext, StoredKV
from saccade.parts.keep import keep_best
from tests.contract.harness import SAME, error, greedy, llama, logits, tokens
from tests.contract.models import tiny


@dataclass(frozen=True, kw_only=True)
class Watch(CachePolicy):
    """Keeps `keep` slots drawn by a fixed pattern (layer-dependent if asked) and notes what it was shown."""

    keep: int = 1000
    by_layer: bool = False

    info = Info(slug="watch", phase="cache", frees_memory=True)
    seen_queries = []  # noqa: RUF012 (filled by the test)

    def watch(self, ctx: LayerContext, kv: StoredKV, q: torch.Tensor) -> None:
        self.seen_queries.append((ctx.layer, q.clone(), kv.keys.shape, kv.heads))

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        scores = (torch.arange(kv.length) * 7919 % 101).float().expand(kv.keys.shape[0], kv.keys.shape[1], -1)
        keep_best(kv, scores, self.keep + 9 * ctx.layer * self.by_layer)


@pytest.fixture(autouse=True)
def _clean() -> None:
    Watch.seen_queries.clear()


def test_queries_are_seen_where_they_live() -> None:
    """`cache.update` runs before attention and never sees Q: policies get it from the attention function, after RoPE."""
    model, ids = llama(), tokens(2, 30)
    with capture(model) as captured:
        model(ids)
    with saccade.attach(model, cache=Watch()), torch.no_grad():
        model(ids)
    for layer, q, *_ in Watch.seen_queries:
        assert torch.equal(q, captured[layer].q)


def test_a_mask_function_is_registered_beside_the_attention_function() -> None:
    """Without one, transformers silently drops the padding mask."""
    with saccade.attach(llama()):
        assert "saccade" in ALL_ATTENTION_FUNCTIONS._global_mapping
        assert "saccade" in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    ids = tokens(2, 40)
    ids[1, :11] = 0
    mask = (ids > 0).long()
    plain = llama()(ids, attention_mask=mask).logits
    with saccade.attach(llama()):
        padded = llama()(ids, attention_mask=mask).logits
        assert error(padded[0], plain[0]) < SAME and error(padded[1, 11:], plain[1, 11:]) < SAME
        assert error(padded[1, 11:], llama()(ids).logits[1, 11:]) > 1e-3, "the mask must matter"


def test_eviction_does_not_move_positions() -> None:
    """Length means tokens seen: after eviction `generate` feeds only the new token, at its true position."""
    model, ids = llama(), tokens(1, 60)
    lengths, places = [], []

    def spy(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        lengths.append(kwargs["input_ids"].shape[1])
        places.append(kwargs["position_ids"].flatten()[-1].item() if kwargs.get("position_ids") is not None else None)

    with saccade.attach(model, cache=Watch(keep=20)) as handle:
        remove = model.register_forward_pre_hook(spy, with_kwargs=True)
        c = DynamicCache(config=model.config)
        first = greedy(model, ids, 4, past_key_values=c)
        assert c.get_seq_length() == 63 and handle.stats().kept[0] == [23, 23]
        greedy(model, first, 3, past_key_values=c)
        remove.remove()
    assert lengths == [60, 1, 1, 1, 1, 1, 1]
    assert [p for p in places if p is not None][-1] == 65


def test_mask_sizes_follow_the_recipe() -> None:
    layer = KVLayer()
    layer.update(torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4))
    slots = layer.open()
    slots.keep(torch.arange(0, 10, 3).expand(1, 2, -1))
    layer.close([(None, slots)])
    assert layer.get_seq_length() == 10
    assert layer.get_mask_sizes(3) == (4 + 3, 10 - 4)


def test_layers_of_different_length_in_a_padded_later_turn() -> None:
    """transformers builds one mask from the first layer; ours come from each layer's own entries."""
    model, ids, turn = llama(), tokens(2, 60), tokens(2, 25, seed=3)
    ids[0, :7] = 0
    mask = torch.cat([(ids > 0).long(), torch.ones(2, 25, dtype=torch.long)], 1)
    whole = torch.cat([ids, turn], 1)
    with saccade.attach(model, cache=Watch(keep=20, by_layer=True)) as handle, torch.no_grad():
        c = DynamicCache(config=model.config)
        model(ids, attention_mask=mask[:, :60], position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :60], past_key_values=c)
        handle.compress(c)
        assert [layer.physical for layer in c.layers] == [20, 29]
        later = model(turn, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1)[:, 60:], past_key_values=c).logits
        for row in range(2):
            alone = DynamicCache(config=model.config)
            own = whole[row : row + 1, mask[row].bool()]
            n = own.shape[1] - 25
            model(own[:, :n], past_key_values=alone)
            handle.compress(alone)
            assert error(model(own[:, n:], past_key_values=alone).logits, later[row : row + 1]) < SAME


def test_a_scattered_cache_is_exact() -> None:
    """Against attention computed by hand over the kept keys at their original positions."""
    model, ids, step = llama(), tokens(1, 50), tokens(1, 1, seed=2)
    with capture(model) as dense:
        model(torch.cat([ids, step], 1))
    with saccade.attach(model, cache=Watch(keep=17)) as handle, torch.no_grad():
        c = DynamicCache(config=model.config)
        model(ids, past_key_values=c)
        handle.compress()
        kept = c.layers[0].positions()[0].long()
        assert not torch.equal(kept[0], torch.arange(kept.shape[1])) and kept.shape == (2, 17)
        Watch.seen_queries.clear()
        model(step, past_key_values=c)
        entries = c.layers[0].open()
        for head in range(2):
            assert error(entries.keys[0, head, :17], dense[0].k[0, head, kept[head]]) < SAME


def test_generate_takes_no_arguments_of_ours() -> None:
    """Model kwargs that generate does not know are refused by transformers, so nothing of ours passes through it."""
    with saccade.attach(llama(), cache=Watch(keep=20)):
        greedy(llama(), tokens(1, 30), 2)
        with pytest.raises(ValueError, match="model_kwargs"):
            greedy(llama(), tokens(1, 30), 2, saccade_budget=3)


def test_latent_attention_scores_heads_and_evicts_latents() -> None:
    model = tiny("deepseek-v3", torch.float64)
    with saccade.attach(model, cache=Watch(keep=20)) as handle:
        c = DynamicCache(config=model.config)
        model(tokens(1, 40), past_key_values=c)
        _, q, keys, stored_heads = Watch.seen_queries[0]
        assert keys == (1, 6, 40, 24) and stored_heads == 1 and q.shape[1] == 6
        assert c.layers[0].keys is not None and c.layers[0].keys.shape == (1, 1, 20, 20)
        assert handle.stats().kept == [[20], [20]]


def test_sliding_layers_are_left_alone() -> None:
    model = tiny("gemma3", torch.float64)
    ids = tokens(1, 75)
    plain = logits(model, ids, steps=3)
    with saccade.attach(model, cache=Watch()) as handle:
        c = DynamicCache(config=model.config)
        model(ids, past_key_values=c)
        kinds = [type(layer) for layer in c.layers]
        assert kinds == [DynamicSlidingWindowLayer, KVLayer] * 2 and handle.managed == [1, 3]
        assert error(logits(model, ids, steps=3), plain) < SAME
    assert {layer for layer, *_ in Watch.seen_queries} == {1, 3}


def test_linear_layers_are_left_alone() -> None:
    config = transformers.Qwen3NextConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=0, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3NextForCausalLM(config).eval()
    plain = greedy(model, tokens(1, 40), 5)
    with saccade.attach(model) as handle:
        assert torch.equal(greedy(model, tokens(1, 40), 5), plain)
        assert handle.managed == [3]


def test_layers_that_share_a_cache_are_left_alone() -> None:
    """Gemma-3n's last layers read the cache of the last earlier layer of their kind."""
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma3nTextConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_kv_shared_layers=2, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8, pad_token_id=0,
        layer_types=kinds, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 6,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3nForCausalLM(config).eval()
    plain = greedy(model, tokens(1, 40), 5)
    with saccade.attach(model, cache=Watch()) as handle:
        assert torch.equal(greedy(model, tokens(1, 40), 5), plain)
        assert handle.managed == [0]


def test_selection_arguments_of_a_model_are_refused_not_ignored() -> None:
    model = llama()
    with saccade.attach(model), pytest.raises(ValueError, match="passes indices to attention"):
        model(tokens(1, 20), indices=torch.zeros(1, 20, 4, dtype=torch.long))
    with saccade.attach(model), pytest.raises(ValueError, match="passes block_indices"):
        model(tokens(1, 20), block_indices=torch.zeros(1, 20, 4, dtype=torch.long))


def test_crop_counts_tokens_not_slots() -> None:
    model, ids, more = llama(), tokens(1, 50), tokens(1, 12, seed=3)
    with saccade.attach(model, cache=Watch(keep=20)) as handle, torch.no_grad():
        c = DynamicCache(config=model.config)
        model(ids, past_key_values=c)
        once = [model(more[:, i : i + 1], past_key_values=c).logits for i in range(12)]
        c.crop(-10)
        assert c.get_seq_length() == 52 and c.layers[0].physical == 22
        again = [model(more[:, i : i + 1], past_key_values=c).logits for i in range(2, 12)]
        assert all(error(a, b) == 0 for a, b in zip(once[2:], again, strict=True))
        c.crop(-30)  # back into the compressed prompt: only what is older stays
        assert c.get_seq_length() == 32
        assert int(c.layers[0].open(0 if c.layers[0].padded else None).side["positions"].max()) < 32
        assert handle.stats().tokens_seen == 62


def test_custom_masks_and_foreign_caches_are_refused() -> None:
    model, ids = llama(), tokens(1, 20)
    with saccade.attach(model):
        with pytest.raises(ValueError, match="2-D attention masks"):
            model(ids, attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool))
        with pytest.raises(ValueError, match="covers 7 tokens"):
            model(ids, attention_mask=torch.ones(1, 7, dtype=torch.long))
        with pytest.raises(ValueError, match="DynamicCache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))
        with pytest.raises(ValueError, match="attention weights"):
            model(ids, output_attentions=True)


def test_packed_sequences_are_refused() -> None:
    model, ids = llama(), tokens(1, 20)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with saccade.attach(model), pytest.raises(ValueError, match="packed"):
        model(ids, position_ids=positions, use_cache=False)


def test_a_cache_filled_before_is_adopted() -> None:
    model, ids, more = llama(), tokens(2, 40), tokens(2, 5, seed=3)
    whole = logits(model, torch.cat([ids, more], 1))
    c = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=c)
        with saccade.attach(model):
            got = model(more, past_key_values=c).logits
    assert isinstance(c.layers[0], KVLayer) and error(got, whole[:, 40:]) < SAME


def test_leaving_restores_the_model() -> None:
    model, ids = llama(), tokens(1, 30)
    before, implementation = logits(model, ids), model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), saccade.attach(model, cache=Watch(keep=5)):
        logits(model, ids, steps=2)
        with pytest.raises(ValueError, match="already attached"), saccade.attach(model):
            pass
        raise RuntimeError("stop")
    assert model.config._attn_implementation == implementation and not model._forward_pre_hooks
    assert error(logits(model, ids), before) == 0


def test_a_method_in_the_wrong_place_is_refused() -> None:
    with pytest.raises(ValueError, match="pass it as cache="):
        saccade.attach(llama(), prefill="random")
    with pytest.raises(TypeError, match="takes a transformers model"):
        saccade.attach(torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]


def test_dropout_is_refused() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, attention_dropout=0.5
    )).train()  # fmt: skip
    with saccade.attach(model), pytest.raises(ValueError, match="attention dropout"):
        model(tokens(1, 10))


def test_training_runs_through_a_prefill_method() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )).train()  # fmt: skip
    ids = tokens(2, 20)
    plain = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, model.lm_head.weight)[0]
    with saccade.attach(model, prefill="dense"):
        ours = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, model.lm_head.weight)[0]
    assert error(ours, plain) < 1e-5
