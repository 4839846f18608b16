"""HyperAttention (hyperattention, 2310.05869): the claims of the paper, on constructed data and on the pocket model."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.methods.cache.needles import pocket, prompts
from tests.methods.prefill.planted import context, selected
from torch import Tensor

import saccade
from saccade.core import Partial, Selection, merge
from saccade.methods import build
from saccade.methods.prefill.hyperattention import HyperAttention
from saccade.ops import attend

SMALL = HyperAttention(bits=4, block=16, samples=16, min_length=32)


def random_qkv(n_q: int, n_k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 6, n_q, 16), (2, 2, n_k, 16), (2, 2, n_k, 16))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


def core(method: HyperAttention, q: Tensor, k: Tensor, v: Tensor, seed: int = 0) -> Tensor:
    return method._core(context(q, k, v), q, k, v, 1, torch.Generator().manual_seed(seed)).out


# -- the card's evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), [(300, 300), (77, 300)])
def test_block_of_everything_equals_dense(n_q: int, n_k: int) -> None:
    """One block holds all keys, and none of the samples counts twice."""
    q, k, v = random_qkv(n_q, n_k, torch.float64)
    out = replace(SMALL, block=1024).attend(context(q, k, v), q, k, v)
    assert (out - attend(q, k, v).out).abs().max() < 1e-12
    ran: list[Selection | None] = []
    replace(SMALL, min_length=300).attend(context(q, k, v, ran=ran), q, k, v)
    assert ran == [None]


@pytest.mark.parametrize(("n_q", "n_k", "least"), [(256, 256, 32), (301, 301, 32), (301, 301, 7), (130, 430, 32), (33, 33, 32)])
def test_recursion_with_an_exact_core_equals_dense(monkeypatch: pytest.MonkeyPatch, n_q: int, n_k: int, least: int) -> None:
    """The causal split and the merges lose nothing and count nothing twice, odd lengths included."""

    def exact(self: HyperAttention, ctx: object, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Partial:
        return attend(q, k, v, causal=False, return_lse=True)

    monkeypatch.setattr(HyperAttention, "_core", exact)
    q, k, v = random_qkv(n_q, n_k, torch.float64)
    out = replace(SMALL, min_length=least).attend(context(q, k, v), q, k, v)
    assert (out - attend(q, k, v).out).abs().max() < 1e-12


def clustered(amplitude: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys around 16 common centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = amplitude * torch.randn(16, 64, generator=generator)
    q, k = (
        (torch.randn(1, 1, 2048, 64, generator=generator) + centres[torch.randint(16, (1, 1, 2048), generator=generator)]) for _ in range(2)
    )
    return q, k, torch.randn(1, 1, 2048, 64, generator=generator)


def errors(q: Tensor, k: Tensor, v: Tensor) -> tuple[float, float, float, float]:
    """Relative errors of: blocks and samples, blocks alone, samples alone, and as many samples as both together."""
    method = HyperAttention(bits=7, block=128, samples=128, min_length=1)
    exact = attend(q, k, v, causal=False).out
    generator = torch.Generator().manual_seed(0)
    selection, rows, keys = method._sorted(q, k, 1, generator)
    a, b, c = (x.gather(2, order.unsqueeze(-1).expand_as(x)) for x, order in ((q, rows), (k, keys), (v, keys)))
    alone = replace(selection, tokens=selection.tokens[..., :0], token_counts=selection.token_counts * 0, log_weight=None)
    blocks = attend(a, b, c, alone)
    block_only = torch.zeros_like(exact).scatter_(2, rows.unsqueeze(-1).expand_as(exact), blocks.out)

    def sampled(m: int) -> Tensor:
        ids = torch.randint(2048, (m,), generator=generator)
        return attend(q, k[:, :, ids], v[:, :, ids], causal=False).out

    outs = (core(method, q, k, v), block_only, sampled(128), sampled(256))
    found = [float((out - exact).norm() / exact.norm()) for out in outs]
    return found[0], found[1], found[2], found[3]


def test_blocks_and_samples_together_are_best_on_clusters() -> None:
    found = torch.tensor([errors(*clustered(1.5, seed)) for seed in range(4)]).mean(0)
    both, blocks, samples, _ = found.tolist()
    assert both <= blocks + 0.01 and both < samples - 0.1, found


def test_no_gain_over_uniform_sampling_without_clusters() -> None:
    found = torch.tensor([errors(*clustered(0.0, seed)) for seed in range(4)]).mean(0)
    both, _, _, as_many = found.tolist()
    assert both > 0.85 * as_many, found


def test_sampling_error_falls_with_the_root_of_the_samples() -> None:
    """Blocks of one key leave the sample alone: four times the samples, half the error."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 4, 1024, 32, generator=generator) for _ in range(3))
    exact = attend(q, k, v, causal=False).out
    means = []
    for samples in (32, 128, 512):
        method = HyperAttention(bits=7, block=1, samples=samples, min_length=1)
        means.append(sum(float((core(method, q, k, v, seed) - exact).norm()) for seed in range(2)))
    assert all(1.7 < a / b < 2.3 for a, b in pairwise(means)), means


def test_work_grows_by_a_little_more_than_the_length() -> None:
    """Pairs read: exponent 1 without causality, n log n with it."""
    counts = []
    for n in (512, 1024, 2048, 4096):
        q, k, v = (torch.randn(1, 1, n, 16, generator=torch.Generator().manual_seed(n)) for _ in range(3))
        ran: list[Selection | None] = []
        method = HyperAttention(bits=4, block=32, samples=32, min_length=64)
        method._core(context(q, k, v, ran=ran), q, k, v, 1, torch.Generator().manual_seed(0))
        (whole,) = ran
        assert whole is not None
        ran.clear()
        method.attend(context(q, k, v, ran=ran), q, k, v)
        leaves = n * 65 / 2
        # stacked pieces count once each
        causal = leaves + sum(float(s.pairs().double().mean(1).sum()) for s in ran if s is not None)
        counts.append((float(whole.pairs().double().mean()), causal))
    for a, b in pairwise(counts):
        assert math.log2(b[0] / a[0]) < 1.05 and math.log2(b[1] / a[1]) < 1.4


# -- the definition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), [(100, 100), (64, 130), (200, 90)])
def test_core_is_its_two_branches_merged(n_q: int, n_k: int) -> None:
    """Exact attention in paired blocks, and sampled keys outside the own block with log(n / m) each, duplicates counted each time."""
    q, k, v = random_qkv(n_q, n_k, torch.float64)
    method = replace(SMALL, min_length=1, samples=40)
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    drawn = torch.randint(n_k, (1, 6, 40), generator=generator)[0]
    gray = [i ^ i >> 1 for i in range(16)]
    blocks = -(-n_k // 16)
    size = -(-n_q // blocks)
    out = core(method, q, k, v, seed=3)
    for b in range(2):
        for h in range(6):

            def order(x: Tensor) -> list[int]:
                codes = ((x @ directions > 0).long() * torch.tensor([1, 2, 4, 8])).sum(-1).tolist()
                return sorted(range(len(codes)), key=lambda i: (gray.index(codes[i]), i))

            key_order = order(k[b, h // 3])
            for place, row in enumerate(order(q[b, h])):
                block = place // size
                own = key_order[block * 16 : block * 16 + 16]
                other = [key_order[int(j)] for j in drawn[h] if int(j) // 16 != block]
                logits = k[b, h // 3] @ q[b, h, row] * 0.25
                z = torch.cat([logits[own], logits[other] + math.log(n_k / 40)])
                value = z.softmax(0) @ v[b, h // 3, own + other]
                # log weights are float32
                assert (value - out[b, h, row]).abs().max() < 1e-6


@pytest.mark.parametrize(("n_q", "n_k"), [(200, 200), (90, 200)])
def test_select_shows_what_is_read(n_q: int, n_k: int) -> None:
    """Changing a value changes exactly the rows that are said to read it."""
    q, k, v = random_qkv(n_q, n_k, torch.float64)
    found = selected(SMALL, q, k, v).expand(2, 6).dense_mask()
    before = SMALL.attend(context(q, k, v), q, k, v)
    for key in (3, 50, 120):
        other = v.clone()
        other[:, :, key] += 100.0
        changed = (SMALL.attend(context(q, k, v), q, k, other) - before).abs().amax(-1) > 1e-9
        assert torch.equal(changed, found[..., key])


def test_seed_decides_the_sample() -> None:
    q, k, v = random_qkv(200, 200)
    a, b, c = (saccade.attention(q, k, v, method=SMALL, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_pieces_and_heads_have_samples_of_their_own() -> None:
    q = k = torch.zeros(4, 6, 64, 16)
    selection, *_ = replace(SMALL, min_length=1)._sorted(q, k[:, :2], 2, torch.Generator().manual_seed(0))
    tokens = selection.tokens[:, :, 0]
    assert torch.equal(tokens[0], tokens[2]) and not torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0, 0], tokens[0, 1])


def test_large_gaps_between_branches_do_not_overflow() -> None:
    q, k, v = random_qkv(200, 200)
    out = SMALL.attend(context(300 * q, k, v), 300 * q, k, v)
    assert bool(torch.isfinite(out).all()) and out.abs().max() <= v.abs().max() + 1e-3


def test_gradients_are_those_of_what_was_read() -> None:
    q, k, v = random_qkv(80, 80, torch.float64)
    weights = torch.randn(2, 6, 80, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    loss = (SMALL.attend(context(q, k, v), q, k, v) * weights).sum()
    grads = torch.autograd.grad(loss, inputs)
    with torch.no_grad():
        for x, grad in zip(inputs, grads, strict=True):
            x.view(-1)[37] += 1e-6
            after = (SMALL.attend(context(q, k, v), q, k, v) * weights).sum()
            x.view(-1)[37] -= 1e-6
            assert abs(float((after - loss) / 1e-6 - grad.view(-1)[37])) < 1e-4 * max(1.0, float(grad.abs().max()))


def test_no_value_from_the_future() -> None:
    q, k, v = random_qkv(300, 300)
    other = v.clone()
    other[:, :, 120:] = 7.0
    a, b = (SMALL.attend(context(q, k, x), q, k, x) for x in (v, other))
    assert torch.equal(a[:, :, :120], b[:, :, :120])
    assert not torch.equal(a[:, :, 120:], b[:, :, 120:])


def test_only_the_last_layers_are_sparse() -> None:
    q, k, v = random_qkv(200, 200)
    method = replace(SMALL, last=2)
    for layer in range(4):
        ran: list[Selection | None] = []
        method.attend(context(q, k, v, layer=layer, layers=4, ran=ran), q, k, v)
        assert (ran == [None]) == (layer < 2)


@pytest.mark.parametrize(("field", "value"), [
    ("bits", 0), ("bits", 31), ("block", 0), ("samples", True), ("min_length", 0.5), ("last", -1),
])  # fmt: skip
def test_wrong_fields_are_refused_in_one_sentence(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^hyperattention\({field}=") as caught:
        HyperAttention(**{field: value})
    assert "\n" not in str(caught.value)


def test_spec_round_trip() -> None:
    spec = "hyperattention(block=128, last=4)"
    assert build(spec).spec == spec and build("hyperattention") == HyperAttention()


# -- the pocket model ----------------------------------------------------------------------------------------------------


def test_loss_grows_with_the_layers_that_are_sparse() -> None:
    """On a trained model quality is really lost: little in the last layer, more in all."""
    ids, _ = prompts(1023, (0.5,))
    losses = []
    for last in (0, 1, 8):
        method = HyperAttention(block=64, samples=64, min_length=256, last=last)
        with saccade.attach(pocket(), prefill=method) as handle, torch.no_grad():
            losses.append(float(pocket()(ids, labels=ids).loss))
            density = handle.stats().prefill_density
    assert density is not None and density < 0.7
    assert losses[0] <= losses[1] + 1e-3 and losses[1] < losses[2], losses


def test_merge_is_the_one_of_the_library() -> None:
    q, k, v = random_qkv(40, 40, torch.float64)
    parts = [attend(q, k[:, :, half], v[:, :, half], causal=False, return_lse=True) for half in (slice(0, 20), slice(20, 40))]
    assert (merge(*parts).out - attend(q, k, v, causal=False).out).abs().max() < 1e-12
