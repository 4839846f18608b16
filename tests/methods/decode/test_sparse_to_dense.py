"""sparse-to-dense: what the draft cache holds, and that drafts from it are as good as they should be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from random import Random
from types import SimpleNamespace

import pytest
import torch
from tests.contract.harness import llama, tokens
from tests.methods.decode.harness import ids_of, pocket, tensors
from tests.methods.decode.stack import stack_context
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.attach import Speculated
from saccade.core import Decode, Info, LayerContext, Mass, Selection
from saccade.evaluate.text import grammar
from saccade.methods import build
from saccade.methods.decode.sparse_to_dense import SparseToDense

# -- the draft cache ----------------------------------------------------------------------------------------------------


class Layer:
    """One layer without a model: 6 query heads on 2 key heads, prompts of any chunks, then steps."""

    def __init__(self, method: SparseToDense, n: int, batch: int = 2, vision: Tensor | None = None) -> None:
        g = torch.Generator().manual_seed(1)
        self.q = torch.randn(batch, 6, n, 16, generator=g, dtype=torch.float64)
        _, self.k, self.v = tensors(batch, 6, 2, n, 16)
        self.method, self.vision, self.sequence = method, vision, {}

    def context(self, seen: int, phase: str) -> LayerContext:
        part = (self.q[:, :, :1], self.k[:, :, :seen], self.v[:, :, :seen])
        ctx = stack_context(0, 1, *part, {}, [], sequence=self.sequence, seen=seen)
        ctx.phase = phase
        return ctx

    def read(self, begin: int, end: int) -> None:
        side = {} if self.vision is None else {"vision": self.vision[:, None, :end].expand(-1, 2, -1).to(torch.uint8)}
        kv = SimpleNamespace(keys=self.k[:, :, :end], values=self.v[:, :, :end], side=side, length=end)
        self.method.watch(self.context(end, "cache"), kv, self.q[:, :, begin:end])

    def step(self, place: int) -> Tensor:
        """What the token at `place` reads, bool `(B, 2, place + 1)`."""
        part = (self.q[:, :, place : place + 1], self.k[:, :, : place + 1], self.v[:, :, : place + 1])
        ctx = self.context(place + 1, "decode")
        self.method.observe(ctx, *part[1:], place)
        found = self.method.select(ctx, *part).dense_mask()[:, :, 0].expand(-1, 2, -1)
        self.read(place, place + 1)
        return found

    def expected(self, n: int, budget: int, vision: Tensor) -> Tensor:
        """The card's formula, from the whole map of the first n tokens."""
        logits = (self.q[:, :, :n].unflatten(1, (2, 3)) @ self.k[:, :, None, :n].mT) / 4
        weights = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
        scores = (weights * ~vision[:, None, None, :n, None]).sum((2, 3))
        kept = (~vision[:, None, :n]).expand(-1, 2, -1).clone()
        for row in range(len(vision)):
            count = max(0, budget - int((~vision[row, :n]).sum()))
            for head in range(2):
                ranked = scores[row, head].masked_fill(~vision[row, :n], -1).argsort(descending=True)
                kept[row, head, ranked[:count]] = True
        return kept


def images(n: int) -> Tensor:
    """Rows with different numbers of image tokens, in two stretches."""
    vision = torch.zeros(2, n, dtype=torch.bool)
    vision[0, 4:30] = vision[0, 35:50] = vision[1, 10:40] = True
    return vision


def test_steps_read_the_images_that_the_text_looked_at_and_all_text() -> None:
    vision = images(80)
    layer = Layer(SparseToDense(budget=40), 80, vision=vision)
    layer.read(0, 70)
    wanted = layer.expected(70, 40, vision)
    assert wanted.sum(-1).eq(40).all() and not torch.equal(wanted[:, 0], wanted[:, 1])
    for place in (70, 71, 72):
        found = layer.step(place)
        assert torch.equal(found[..., :70], wanted) and bool(found[..., 70:].all())


def test_without_images_the_last_tokens_are_the_text() -> None:
    layer = Layer(SparseToDense(budget=20, text=6), 80)
    layer.read(0, 70)
    vision = (torch.arange(70) < 64).expand(2, -1)
    assert torch.equal(layer.step(70)[..., :70], layer.expected(70, 20, vision))
    alone = Layer(SparseToDense(budget=4, text=6), 80)
    alone.read(0, 70)
    assert torch.equal(alone.step(70)[..., :70], ~vision[:, None].expand(-1, 2, -1)), "text is read even where it is more than the budget"


@pytest.mark.parametrize("with_images", [True, False])
def test_chunks_and_guesses_at_a_prompts_end_change_nothing(with_images: bool) -> None:
    vision = images(80) if with_images else None
    found = []
    for cuts in ([0, 60], [0, 33, 37, 60], [0, 20, 66]):  # the last one reads 6 guesses that are taken back
        layer = Layer(SparseToDense(budget=0.6, text=8), 80, vision=vision)
        for begin, end in pairwise(cuts):
            layer.read(begin, end)
        found.append(layer.step(60))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and not bool(found[0].all())


def test_a_later_prompt_chooses_anew_and_guesses_do_not() -> None:
    vision = images(120)
    vision[1, 80:95] = True
    layer = Layer(SparseToDense(budget=50), 120, vision=vision)
    layer.read(0, 70)
    for place in (70, 71):
        layer.step(place)
    layer.method.rewind(layer.context(71, "decode"), 71)
    assert torch.equal(layer.step(71)[..., :70], layer.expected(70, 50, vision)), "made once"
    before = layer.step(72)
    layer.read(73, 110)
    after = layer.step(110)[..., :73]
    assert not torch.equal(before, after)
    assert bool(after[..., 70:].all()) and after.sum(-1).amax() <= 50
    layer.method.rewind(layer.context(105, "decode"), 105)
    assert "draft" not in layer.sequence["sparse-to-dense 0"]


@torch.no_grad()
def test_on_a_model_marked_tokens_are_the_images() -> None:
    model, ids = llama(), tokens(1, 90)
    mask = torch.zeros(1, 90, dtype=torch.bool)
    mask[:, 10:70] = True
    with saccade.attach(model, decode="sparse-to-dense(budget=45)") as handle:
        handle.mark_vision(mask)
        cache = model(ids).past_key_values
        model(ids[:, :1], past_key_values=cache)
        state = cache.layers[0].sequence(None)
        for layer in (0, 1):
            draft = state[f"sparse-to-dense {layer}"]["draft"]
            assert draft.shape == (1, 2, 45)
            outside = torch.cat([torch.arange(10), torch.arange(70, 90)]).int()
            assert bool((draft[0, :, :, None] == outside).any(-2).all()), "all text is read"
        assert handle.stats().decode_density == pytest.approx(46 / 91)


@torch.no_grad()
def test_a_prompt_read_before_uses_the_first_query() -> None:
    model, ids = llama(), tokens(1, 90)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with saccade.attach(model, decode="sparse-to-dense(budget=20, text=4)") as handle:
        model(ids[:, :1], past_key_values=cache)
        assert handle.stats().decode_density == pytest.approx(21 / 91)


# -- drafting -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Window(Decode):
    """Four sinks and the newest tokens: a draft that looks at nothing."""

    size: int
    info = Info(slug="window-draft", phase="decode")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        return Selection.window(1, k.shape[2], self.size - 4, sinks=4, block_q=1, block_k=1)


@cache
def prompts() -> tuple[Tensor, ...]:
    """Two pieces of code, 700 bytes each."""
    return tuple(ids_of(grammar().haystack(Random(seed), 700)) for seed in (0, 3))


@cache
def dense() -> tuple[Tensor, ...]:
    return tuple(pocket().generate(ids, max_new_tokens=19, do_sample=False) for ids in prompts())


@cache
def written(method: Decode) -> tuple[Speculated, ...]:
    return tuple(saccade.speculate(pocket(), ids, method, max_new_tokens=19, gamma=5) for ids in prompts())


def acceptance(method: Decode) -> float:
    """Share of all drafted tokens."""
    runs = written(method)
    return sum(sum(map(sum, run.accepted)) for run in runs) / sum(sum(run.drafted) for run in runs)


@pytest.mark.parametrize("budget", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_greedy_output_is_that_of_dense_attention(budget: int) -> None:
    for found, plain in zip(written(SparseToDense(budget=budget)), dense(), strict=True):
        assert torch.equal(found.tokens, plain)
    assert acceptance(SparseToDense(budget=budget)) < 1, "drafts were refused on the way"


@pytest.mark.slow
def test_a_draft_cache_of_all_entries_is_always_right() -> None:
    for found, plain in zip(written(SparseToDense(budget=1.0)), dense(), strict=True):
        assert found.acceptance == 1.0 and torch.equal(found.tokens, plain)
        assert found.passes == 3, "18 tokens after the prompt's own, in rounds of 5 drafts and one more"


@pytest.mark.slow
def test_acceptance_rises_with_the_budget_and_beats_a_window() -> None:
    few, more, window = acceptance(SparseToDense(budget=64)), acceptance(SparseToDense(budget=256)), acceptance(Window(size=256))
    assert few + 0.1 < more and window + 0.1 < more, (few, more, window)


# -- fields -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": Mass(0.9)}, "keeps a draft cache of fixed size"),
        ({"budget": 0}, "budget 0 is not a positive number"),
        ({"text": 0}, "text=0: expected a whole number of at least 1"),
        ({"text": True}, "text=True"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseToDense(**fields)


def test_spec_round_trip() -> None:
    assert build("sparse-to-dense(budget=0.2, text=16)").spec == "sparse-to-dense(budget=0.2, text=16)"
