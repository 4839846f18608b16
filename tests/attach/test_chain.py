"""Cache policies in a row, state across layers, published selections, and tokens of images."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import saccade
from saccade.cache import KVLayer
from saccade.cache.parted import PartedSegment
from saccade.core import CachePolicy, Decode, Info, LayerContext, Selection, StoredKV
from saccade.methods import build
from saccade.methods.chain import Chain
from tests.contract.models import tiny


def ids(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (batch, n), generator=torch.Generator().manual_seed(seed))


def generate(model, inputs: Tensor, n: int = 6, **options) -> Tensor:
    with torch.no_grad():
        return model.generate(inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, **options)


def test_a_chain_evicts_then_encodes() -> None:
    model = tiny("llama")
    with saccade.attach(model, cache="snapkv(budget=24, window=4)|zipcache(interval=8)") as handle, torch.no_grad():
        out = model(ids(2, 60), use_cache=True)
        handle.compress()
        assert all(set(layer) == {24} for layer in handle.stats().kept)
        layers = [layer for layer in out.past_key_values.layers if isinstance(layer, KVLayer)]
        assert all(isinstance(segment, PartedSegment) and segment.length == 24 for layer in layers for segment in layer.segments)
        assert all(len(layer.segments) == 1 for layer in layers)
        kept = handle.stats().kv_bytes
    with saccade.attach(model, cache="snapkv(budget=24, window=4)") as handle, torch.no_grad():
        out = model(ids(2, 60), use_cache=True)
        handle.compress()
        assert kept < handle.stats().kv_bytes


def test_a_chain_whose_encoder_keeps_every_bit_is_the_eviction_alone() -> None:
    model = tiny("llama")
    inputs = ids(2, 50)
    found = []
    for cache in ("snapkv(budget=20, window=4)", "snapkv(budget=20, window=4)|zipcache(salient_bits=16, other_bits=16, interval=4)"):
        with saccade.attach(model, cache=cache):
            found.append(generate(model, inputs, 12, num_beams=2))
    assert torch.equal(*found)


def test_saliency_after_an_eviction_counts_the_rows_that_saw_a_token() -> None:
    """The entries of a chain are not the last tokens: a row that stands between two of them sees the first only."""
    from saccade.parts.saliency import normalised_saliency

    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 2, 3, 8, generator=generator), torch.randn(1, 1, 5, 8, generator=generator)
    places = torch.tensor([[[2, 3, 10, 11, 20]]])
    found = normalised_saliency(q, torch.tensor([5, 10, 15]), k, scale=0.3, places=places)
    logits = (q @ k.mT) * 0.3
    visible = places[0, 0] <= torch.tensor([5, 10, 15])[:, None]
    mass = logits.masked_fill(~visible, -torch.inf).softmax(-1).sum((1, 2))[0]
    assert torch.allclose(found[0, 0, :4], mass[:4] / torch.tensor([3.0, 3, 2, 1])) and found[0, 0, 4] == torch.inf


def test_chains_are_one_spec_and_refuse_what_makes_no_sense() -> None:
    chain = build("snapkv(budget=0.5) | zipcache")
    assert isinstance(chain, Chain) and chain.spec == "snapkv(budget=0.5)|zipcache" and build(chain.spec) == chain
    assert chain.info.encodes and chain.info.frees_memory and "queries" in chain.info.needs
    with pytest.raises(ValueError, match="zipcache encodes all that is there, so nothing is left for snapkv"):
        build("zipcache|snapkv")
    with pytest.raises(ValueError, match="quest acts on the decode phase"):
        build("snapkv|quest")
    with pytest.raises(ValueError, match="reads keys in full precision"):
        saccade.attach(tiny("llama"), cache="snapkv|zipcache", decode="magicpig")


@dataclass(frozen=True, kw_only=True)
class Counting(CachePolicy):
    """Counts the tokens of the sequence over all layers, and drops nothing."""

    info = Info(slug="counting", phase="cache")

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        shape = (kv.keys.shape[0],)
        ctx.sequence["tokens"] = ctx.sequence.get("tokens", torch.zeros(shape)) + q.shape[2]
        ctx.sequence.setdefault("layers", []).append(ctx.layer)

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        pass


def test_sequence_state_is_one_for_all_layers_and_follows_the_rows() -> None:
    model = tiny("llama")
    with saccade.attach(model, cache=Counting()) as handle, torch.no_grad():
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[1, :4] = 0
        cache = model(ids(2, 9), attention_mask=mask, use_cache=True).past_key_values
        layers = cache.layers
        assert handle.cache is cache and [layers[0].sequence(row)["tokens"].tolist() for row in (0, 1)] == [[18.0], [10.0]]
        assert layers[1].sequence(1) is layers[0].sequence(1)
        cache.reorder_cache(torch.tensor([1, 1]))
        assert [layers[1].sequence(row)["tokens"].tolist() for row in (0, 1)] == [[10.0], [10.0]]


@dataclass(frozen=True, kw_only=True)
class Planner(Decode):
    """Layer 0 reads everything and tells layer 1 to read the last three keys and the one that its query names."""

    info = Info(slug="planner", phase="decode")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        n = k.shape[2]
        far = (q[:, 0].norm(dim=-1) * 100).long() % n  # the same at every position
        tokens = torch.cat([far, torch.arange(n - 3, n).expand(len(far), 3)], 1)
        return Selection.from_positions(tokens[:, None, None], n_q=1, n_k=n)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.publish(self.select(ctx, q, k, v))
        return ctx.attend(q, k, v, None)

    def layer_policy(self, layer: int, layers: int):
        return 0 if layer else "select"


@pytest.mark.parametrize("padded", [False, True])
def test_a_published_selection_belongs_to_its_row_and_its_query(padded: bool) -> None:
    """Guessed tokens and padded rows run one by one inside a layer; the next layer reads what was published for the same one."""
    model = tiny("llama")
    inputs = ids(3, 40, seed=4)
    mask = torch.ones_like(inputs)
    if padded:
        mask[1, :7] = 0
    with saccade.attach(model, decode=Planner()) as handle, torch.no_grad():
        cache = model(inputs, attention_mask=mask, use_cache=True).past_key_values
        guesses = ids(3, 4, seed=5)
        more = torch.cat([mask, torch.ones(3, 4, dtype=mask.dtype)], 1)
        together = model(guesses, attention_mask=more, past_key_values=cache, use_cache=True).logits
        density = handle.stats().per_layer[1]["decode_density"]
    assert density is not None and density < 0.12
    alone = []
    for row in range(3):
        own = inputs[row : row + 1, 7 if padded and row == 1 else 0 :]
        with saccade.attach(model, decode=Planner()), torch.no_grad():
            cache = model(own, use_cache=True).past_key_values
            steps = [model(guesses[row : row + 1, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(4)]
        alone.append(torch.cat(steps, 1))
    assert (together - torch.cat(alone)).abs().max() < 1e-5


def test_a_layer_that_reads_what_was_not_published_says_so() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Early(Planner):
        def layer_policy(self, layer: int, layers: int):
            return "select" if layer else 1

    model = tiny("llama")
    with saccade.attach(model, decode=Early()), pytest.raises(ValueError, match="layer 0 reads the selection of layer 1 again"):
        generate(model, ids(1, 30))


@dataclass(frozen=True, kw_only=True)
class DropText(CachePolicy):
    """Keeps tokens of images and the last four."""

    info = Info(slug="drop-text", phase="cache", ragged=True)

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        stays = kv.side["vision"].bool()
        stays[..., -4:] = True
        order = torch.sort((~stays).to(torch.uint8), dim=-1, stable=True).indices
        kv.keep(order[..., : int(stays.sum(-1).max())], stays.sum(-1))


def test_tokens_of_images_are_known_to_policies() -> None:
    model = tiny("llama")
    marked = torch.zeros(2, 20, dtype=torch.bool)
    marked[:, 3:8] = True
    with saccade.attach(model, cache=DropText()) as handle, torch.no_grad():
        handle.mark_vision(marked)
        out = model(ids(2, 20), use_cache=True)
        handle.compress()
        assert all(kept == [9, 9] for kept in handle.stats().kept)
        model(ids(2, 1), past_key_values=out.past_key_values)
        handle.mark_vision(marked[:, :5])
        with pytest.raises(ValueError, match="mark all of it"):
            model(ids(2, 4), past_key_values=out.past_key_values)
    with saccade.attach(model, cache=DropText()) as handle, pytest.raises(ValueError, match="expected a bool mask"):
        handle.mark_vision(marked.int())
