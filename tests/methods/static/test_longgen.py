"""LongGen (longgen, 2410.01485): which layers are dense, the masks, the cache's share, steps over it, and what the middle third learns."""

from __future__ import annotations

import pytest
import torch
from tests.contract.harness import error, llama, logits, tokens
from tests.methods.prefill.planted import context
from tests.methods.static.grids import masked_dense, qkv
from tests.methods.static.learners import accuracy
from torch import Tensor

import saccade
from saccade.methods import build
from saccade.methods.static.longgen import LongGen
from saccade.parts.static import CachePlan

SPARSE = {"sink": "longgen(block=4, window=3)", "blocks": "longgen(variant='blocks', block=4, window=2, stride=3, sinks=0)"}


def sparse_map(method: LongGen, n: int, kv_heads: int) -> Tensor:
    """Which row reads which in a sparse layer, `(Hk, n, n)`, from the card's formulas."""
    i, j = torch.arange(n).unsqueeze(1) // method.block, torch.arange(n) // method.block
    maps = []
    for h in range(kv_heads):
        read = (i - j < method.window) | (j < method.sinks)
        if method.variant == "blocks":
            read = read | ((j + h * max(1, method.stride // kv_heads)) % method.stride == 0)
        maps.append(read)
    return torch.stack(maps) & torch.ones(n, n, dtype=torch.bool).tril()


def test_the_middle_third_is_dense() -> None:
    def dense(layers: int, **fields) -> list[int]:
        return [i for i in range(layers) if LongGen(**fields).is_dense(i, layers)]

    assert dense(9) == [3, 4, 5] and dense(32) == list(range(11, 22)) and dense(8) == [3, 4, 5]
    assert dense(9, dense="ends") == [0, 1, 8] and dense(9, dense="none") == [] and dense(1) == []


@pytest.mark.parametrize("n_q", [101, 38, 1])
@pytest.mark.parametrize("variant", SPARSE)
def test_the_mask_is_the_paper_s_forward_and_backward(variant: str, n_q: int) -> None:
    method = build(SPARSE[variant])
    assert isinstance(method, LongGen)
    q, k, v = qkv(101, grad=True)
    pairs = sparse_map(method, 101, 2)
    part = q[:, :, -n_q:]
    assert torch.equal(method.select(context(part, k, v), part, k, v).dense_mask()[0].expand(2, -1, -1), pairs[:, -n_q:])
    ours = method.attend(context(part, k, v), part, k, v)
    theirs = masked_dense(q, k, v, pairs.repeat_interleave(2, 0))[:, :, -n_q:]
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0), dtype=ours.dtype)
    found, expected = ([out, *torch.autograd.grad((out * upstream).sum(), (q, k, v))] for out in (ours, theirs))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, expected, strict=True))


def test_dense_layers_and_wide_windows_equal_dense() -> None:
    q, k, v = qkv(90)
    exact = masked_dense(q, k, v, torch.ones(90, 90, dtype=torch.bool).tril())
    method = LongGen(block=4, window=2)
    same = [bool((method.attend(context(q, k, v, layer=i, layers=6), q, k, v) - exact).abs().max() < 1e-12) for i in range(6)]
    assert same == [False, False, True, True, False, False]
    wide = LongGen(block=4, window=23)
    assert (wide.attend(context(q, k, v, layers=6), q, k, v) - exact).abs().max() < 1e-12


def test_the_cache_has_a_third_and_two_thirds_of_what_is_kept() -> None:
    n = 1 << 17
    # rho = 1/64 and 1/16 of 128K tokens: 2K (the default) and 8K
    assert LongGen().kv_share(n, 30) == pytest.approx(1 / 3 + 2 / 3 / 64, abs=5e-4) == pytest.approx(0.344, abs=1e-3)
    assert LongGen(window=127).kv_share(n, 30) == pytest.approx(0.375, abs=1e-3)


@pytest.mark.parametrize("variant", SPARSE)
def test_what_leaves_is_never_read_again(variant: str) -> None:
    method = build(SPARSE[variant])
    assert isinstance(method, LongGen)
    n, pairs, plan = 96, sparse_map(method, 96, 2), CachePlan(method.heads(2), 2)
    assert plan.evictable
    for t in range(n - 1):
        kept = plan.keep(torch.arange(t + 1).expand(1, 2, -1), t)[0]
        assert not (pairs[:, t + 1 :, : t + 1].any(1) & ~kept).any()
        assert torch.equal(plan.size(t), kept.sum(-1))


@pytest.mark.parametrize("variant", SPARSE)
def test_steps_over_a_shrinking_cache_equal_the_masked_forward(variant: str) -> None:
    model, ids, spec = llama(), tokens(2, 110), SPARSE[variant]
    with saccade.attach(model, prefill=spec, decode=spec):
        at_once = logits(model, ids)
        assert error(logits(model, ids, steps=60), at_once) < 1e-9
        assert error(logits(model, ids, chunks=[60, 5, 45]), at_once) < 1e-9
    with saccade.attach(model, prefill=spec, cache=spec) as handle:
        assert error(logits(model, ids, steps=60), at_once) < 1e-9
        kept = handle.stats().kept
    method = build(spec)
    assert isinstance(method, LongGen)
    expected = CachePlan(method.heads(2), 2).size(107).tolist()
    assert kept == [[x + 2 for x in expected], [110, 110]]  # of two layers the second counts as the middle; a block is being filled


def test_padded_rows_and_beams_over_the_cache() -> None:
    model, ids = llama(), tokens(2, 80)
    ids[1, :11] = 0
    with saccade.attach(model, prefill=SPARSE["sink"], cache=SPARSE["sink"]):
        both = model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=12, do_sample=False)
        alone = model.generate(ids[1:, 11:], max_new_tokens=12, do_sample=False)
        assert torch.equal(both[1:, 11:], alone)
        assert model.generate(ids[:1], max_new_tokens=6, num_beams=3, do_sample=False).shape == (1, 86)


def test_an_attached_model_trains() -> None:
    """Gradients of a model in which layer 0 is sparse and layer 1 dense equal those of the reference, which masks all logits."""
    model, ids = llama(), tokens(1, 60)

    def gradients(spec: str, impl: str = "auto") -> list[Tensor]:
        model.zero_grad()
        with saccade.attach(model, prefill=spec, impl=impl):
            model(ids, labels=ids, use_cache=False).loss.backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    model.train()
    try:
        ours, theirs = gradients(SPARSE["sink"]), gradients(SPARSE["sink"], "reference")
        dense = gradients("longgen(window=1000)")
    finally:
        model.eval()
    assert len(ours) == len(list(model.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-12) for a, b in zip(ours, theirs, strict=True))
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(ours, dense, strict=True))


@pytest.mark.slow
def test_recall_beyond_the_window_needs_the_dense_third() -> None:
    """Pairs of key and value, fillers, then a key: three layers whose windows together do not span the fillers."""
    keys, values, gap = 6, 4, 26

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = 32
        order = torch.rand(rows, keys, generator=generator).argsort(-1)
        value = torch.randint(0, values, (rows, keys), generator=generator)
        asked = torch.randint(0, keys, (rows, 1), generator=generator)
        ids = torch.cat([order * values + value, torch.full((rows, gap), keys * values), keys * values + 1 + order.gather(1, asked)], 1)
        targets = torch.full((rows, keys + gap + 1), -100)
        targets[:, -1] = value.gather(1, asked).squeeze(1)
        return ids, targets

    shape = {"steps": 200, "ids": keys * values + 1 + keys, "out": values, "n": keys + gap + 1, "layers": 3}
    found = {place: float(accuracy(f"longgen(block=4, window=2, sinks=0, dense={place!r})", batch, **shape)[-1])
             for place in ("middle", "ends", "none")}  # fmt: skip
    assert found["middle"] > 0.9 and found["none"] < 0.4 and found["ends"] <= found["middle"] + 0.05


def test_fields_are_checked() -> None:
    for spec, message in (
        ("longgen(variant='other')", "variant='other'"), ("longgen(dense='late')", "dense='late'"), ("longgen(sinks=-1)", "sinks=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            build(spec)
