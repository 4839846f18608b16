"""S2-Attention (s2-attention, 2407.17678): the mask, its limits, cover by the heads, eviction, gradients, and what hybrids can learn."""

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
from saccade.methods.static.s2_attention import S2Attention
from saccade.parts.static import CachePlan

SPARSE = "s2-attention(block=4, local=2, stride=4, dense_every=0)"


def s2_map(n: int, kv_heads: int, block: int, local: int, v: int) -> Tensor:
    """Which row reads which for every key/value head, `(Hk, n, n)`, from the card's formula."""
    i, j = torch.arange(n).unsqueeze(1) // block, torch.arange(n) // block
    step = max(1, v // kv_heads)
    maps = [(i - j < local) | ((j + h * step) % v == 0) for h in range(kv_heads)]
    return torch.stack(maps) & torch.ones(n, n, dtype=torch.bool).tril()


@pytest.mark.parametrize("n_q", [101, 38, 1])
def test_the_mask_is_the_paper_s_forward_and_backward(n_q: int) -> None:
    method = S2Attention(block=4, local=3, stride=5, dense_every=0)
    q, k, v = qkv(101, grad=True)
    pairs = s2_map(101, 2, 4, 3, 5)
    part = q[:, :, -n_q:]
    assert torch.equal(method.select(context(part, k, v), part, k, v).dense_mask()[0], pairs[:, -n_q:])
    ours = method.attend(context(part, k, v), part, k, v)
    theirs = masked_dense(q, k, v, pairs.repeat_interleave(2, 0))[:, :, -n_q:]
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0), dtype=ours.dtype)
    found, expected = ([out, *torch.autograd.grad((out * upstream).sum(), (q, k, v))] for out in (ours, theirs))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, expected, strict=True))


def test_limits() -> None:
    q, k, v = qkv(90)
    exact = masked_dense(q, k, v, torch.ones(90, 90, dtype=torch.bool).tril())
    for fields in ({"stride": 1}, {"local": 23}, {"dense_heads": 2}, {"dense_every": 1}):
        method = S2Attention(**{"block": 4, "local": 2, "stride": 4, "dense_every": 0, **fields})
        assert (method.attend(context(q, k, v), q, k, v) - exact).abs().max() < 1e-12, fields


def test_dense_layers_and_heads() -> None:
    q, k, v = qkv(90)
    exact = masked_dense(q, k, v, torch.ones(90, 90, dtype=torch.bool).tril())

    def off(method: S2Attention, layer: int) -> Tensor:
        return (method.attend(context(q, k, v, layer=layer), q, k, v) - exact).abs().amax((0, 2, 3)) > 1e-9

    assert [bool(off(S2Attention(block=4, local=2), i).any()) for i in range(4)] == [True, False, True, False]
    assert off(S2Attention(block=4, local=2, dense_heads=1), 0).tolist() == [True, True, False, False]


def test_heads_together_cover_every_block() -> None:
    j = torch.arange(64).view(1, -1)
    for kv_heads, v, covered in ((8, 8, 1.0), (16, 8, 1.0), (4, 8, 0.5)):
        far = S2Attention(block=1, local=1, stride=v).heads(kv_heads).allow(torch.full((1, 1), 1000), j)
        assert float(far.any(0).double().mean()) == covered
    alike = S2Attention(block=1, local=1, heterogeneous=False).heads(8).allow(torch.full((1, 1), 1000), j)
    assert float(alike.any(0).double().mean()) == 1 / 8


def test_density_follows_the_formula() -> None:
    n, block, local, v = 2048, 16, 4, 8
    q, k, v_ = (torch.zeros(1, 8, n, 4) for _ in range(3))
    density = S2Attention(block=block, local=local, stride=v, dense_every=0).select(context(q, k, v_), q, k, v_).density()
    window = local * block / n * 2
    assert density == pytest.approx(window + (1 - window) / v, rel=0.05)


def test_what_leaves_is_never_read_again() -> None:
    """Brute force over later queries, and the paper's test: below the diagonal a column that turned 0 stays 0."""
    n, pairs = 96, s2_map(96, 2, 4, 3, 5)
    shrinking = pairs[:, 1:] <= pairs[:, :-1]
    assert bool((shrinking | ~torch.ones(n - 1, n, dtype=torch.bool).tril()).all())
    plan = CachePlan(S2Attention(block=4, local=3, stride=5).heads(2), 2)
    assert plan.evictable
    for t in range(n - 1):
        kept = plan.keep(torch.arange(t + 1).expand(1, 2, -1), t)[0]
        assert not (pairs[:, t + 1 :, : t + 1].any(1) & ~kept).any()
    assert int(plan.size(10_000 - 1)[0]) == pytest.approx(2 * 4 + 10_000 / 5, abs=8)


def test_steps_over_a_shrinking_cache_equal_the_masked_forward() -> None:
    model, ids = llama(), tokens(2, 150)
    with saccade.attach(model, prefill=SPARSE, decode=SPARSE):
        at_once = logits(model, ids)
        assert error(logits(model, ids, chunks=[60, 37, 5, 48]), at_once) < 1e-9
        assert error(logits(model, ids, steps=90), at_once) < 1e-9
    with saccade.attach(model, prefill=SPARSE, cache=SPARSE) as handle:
        assert error(logits(model, ids, steps=90), at_once) < 1e-9
        stats = handle.stats()
    expected = CachePlan(S2Attention(block=4, local=2, stride=4).heads(2), 2).size(147).tolist()
    assert stats.kept == [[x + 2 for x in expected]] * 2  # the block that is being filled
    assert stats.decode_density is not None and stats.decode_density < 0.6


def test_an_attached_model_trains() -> None:
    model, ids = llama(), tokens(2, 60)

    def gradients(**options: object) -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False, **options).loss.backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    model.train()
    try:
        with saccade.attach(model, prefill="s2-attention(block=4, local=2, stride=4, dense_every=0, heterogeneous=False)"):
            ours = gradients()
        i, j = torch.arange(60).unsqueeze(1) // 4, torch.arange(60) // 4
        pairs = ((i - j < 2) | (j % 4 == 0)) & torch.ones(60, 60, dtype=torch.bool).tril()
        theirs = gradients(attention_mask=torch.zeros(2, 1, 60, 60, dtype=torch.float64).masked_fill(~pairs, -torch.inf))
    finally:
        model.eval()
    assert len(ours) == len(theirs) > 10
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_one_dense_layer_copies_from_anywhere() -> None:
    """The last token names a position, the answer is the token there. Homogeneous sparse heads never see most of the positions."""
    n, words = 32, 8

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = torch.randint(0, words, (32, n), generator=generator)
        place = torch.randint(0, n, (32,), generator=generator)
        filler = torch.full((32, 4), words + n)
        targets = torch.full((32, n + 5), -100)
        targets[:, -1] = ids.gather(1, place.unsqueeze(1)).squeeze(1)
        return torch.cat([ids, filler, (words + place).unsqueeze(1)], 1), targets

    shape = {"steps": 200, "ids": words + n + 1, "out": words, "n": n + 5, "layers": 2}
    common = "block=4, local=1, stride=4, heterogeneous"
    hybrid = accuracy(f"s2-attention({common}=True, dense_every=2)", batch, **shape)[-1]
    alike = accuracy(f"s2-attention({common}=False, dense_every=0)", batch, **shape)[-1]
    assert hybrid > 0.9 and alike < 0.6


def test_fields_are_checked() -> None:
    for spec, message in (
        ("s2-attention(block=0)", "block=0"), ("s2-attention(dense_every=-1)", "dense_every=-1"),
        ("s2-attention(local=True)", "local=True"),
    ):
        with pytest.raises(ValueError, match=message):
            build(spec)
