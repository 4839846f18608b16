"""HiP (hip, 2406.09827): the claims of the paper, on constructed maps and on the pocket model."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.methods.cache.needles import pocket, prompts
from tests.methods.prefill.planted import context, hits, selected
from torch import Tensor

import saccade
from saccade.core import Selection
from saccade.methods import build
from saccade.methods.prefill.hip import HiP
from saccade.ops import attend
from saccade.ops.estimate.descend import BlockScores, descend

TINY = HiP(top_k=8, block_q=8, window=5, sinks=3, dense_layers=0)
SHAPES = [(96, 96), (100, 100), (50, 100), (37, 100), (5, 9), (300, 301)]


def random_qkv(n_q: int, n_k: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, n_q, 16), (2, 2, n_k, 16), (2, 2, n_k, 16))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


# -- the card's evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
def test_prompts_within_top_k_are_dense(n_q: int, n_k: int) -> None:
    q, k, v = random_qkv(n_q, n_k)
    method = replace(TINY, top_k=302)
    found = selected(method, q, k, v)
    assert found.density() == 1.0
    assert (attend(q, k, v, found).out - attend(q, k, v).out).abs().max() < 1e-12


def descended(scores: Tensor, keep: int) -> tuple[Tensor, int]:
    """What the descent finds in each row of `scores (rows, n)`, bool, and how many scores it asked for in each row."""
    asked = 0

    def score(ids: Tensor, row: int) -> Tensor:
        nonlocal asked
        asked += ids.shape[-1]
        return torch.gather(scores.unsqueeze(1), -1, ids)

    found = descend(score, torch.tensor([scores.shape[-1]]), keep, (scores.shape[0],))[:, 0]
    assert bool((found[:, 1:] > found[:, :-1]).all())  # ascending, none twice
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, found, True), asked


@pytest.mark.parametrize(("n", "keep"), [(4096, 256), (1024, 16), (512, 512 // 2)])
def test_scores_asked_for(n: int, keep: int) -> None:
    _, asked = descended(torch.randn(1, n, generator=torch.Generator().manual_seed(0)), keep)
    assert asked == 2 * keep * math.log2(n / keep)
    assert (n, keep) != (4096, 256) or asked == 2048


def test_recall_of_the_descent_follows_locality() -> None:
    """Share of the true top 256 of 4096 that is found: a quarter in white noise, nearly all once neighbours score alike."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 4096, generator=generator)
    recalls = {}
    for width in (1, 2, 8):
        scores = noise[:, : 4096 // width].repeat_interleave(width, 1)
        scores = scores + 1e-3 * torch.randn(scores.shape, generator=generator)  # no ties among neighbours
        true = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(256).indices, True)
        found, _ = descended(scores, 256)
        recalls[width] = float((found & true).sum() / true.sum())
    chance = 256 / 4096
    assert 3 * chance < recalls[1] < 0.4, recalls
    assert recalls[2] > recalls[1] and recalls[8] > 0.95, recalls


def test_work_grows_about_linearly() -> None:
    """Scores asked for over a whole prompt, at four lengths: the exponent is close to 1."""
    totals = []
    for n in (2048, 4096, 8192, 16384):
        asked = 0

        def score(ids: Tensor, row: int) -> Tensor:
            nonlocal asked
            asked += ids.numel()
            return torch.zeros(ids.shape)

        sizes = torch.arange(64, n + 1, 64)
        descend(score, sizes, 64, (1,))
        totals.append(asked)
    exponents = [math.log2(b / a) for a, b in pairwise(totals)]
    assert all(1.0 < e < 1.35 for e in exponents) and exponents == sorted(exponents, reverse=True)


# -- the descent ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3, 7, 16])
def test_ragged_rows_are_descended_as_if_alone(keep: int) -> None:
    """Every length from nothing on, so that K rarely divides N and ranges of odd length occur."""
    sizes = torch.arange(0, 90)
    scores = torch.randn(2, 90, 90, generator=torch.Generator().manual_seed(0))
    found = descend(lambda ids, row: torch.gather(scores[:, row:], -1, ids.clamp(max=89)), sizes, keep, (2,))
    for t in range(90):
        real = found[:, t][found[:, t] < t].view(2, -1) if t else found[:, t, :0]
        assert real.shape[-1] == min(t, keep) and bool((real[:, 1:] > real[:, :-1]).all())
        if t > keep:
            alone = descend(lambda ids, row, t=t: torch.gather(scores[:, t : t + 1], -1, ids.clamp(max=89)), sizes[t : t + 1], keep, (2,))
            assert torch.equal(found[:, t], alone[:, 0])
        elif t < 89:
            assert bool((found[:, t, t:] == 89).all())


def test_a_block_scores_by_its_best_sampled_pair() -> None:
    q, k, _ = random_qkv(8, 60)
    rows = q.unflatten(2, (2, 4))[:, :, :, ::2]
    score = BlockScores(rows, k, first=5, block=6, stride=4)
    ids = torch.randint(0, 9, (2, 6, 2, 8), generator=torch.Generator().manual_seed(0))
    found = score(ids, 0)
    for b, h, t, j in ((0, 0, 0, 0), (1, 5, 1, 7), (1, 3, 0, 4)):
        first = 5 + 6 * int(ids[b, h, t, j])
        products = rows[b, h, t] @ k[b, h // 3, [first, first + 4]].T
        assert float(found[b, h, t, j]) == pytest.approx(float(products.max()))


# -- the method ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
@pytest.mark.parametrize(
    "fields", [{}, {"window": 1, "sinks": 0, "block_k": 3, "stride_k": 2, "top_k": 12}, {"block_q": 16, "sinks": 40}], ids=str
)
def test_window_and_sinks_are_read_and_nothing_twice(n_q: int, n_k: int, fields: dict[str, int]) -> None:
    q, k, v = random_qkv(n_q, n_k)
    method = replace(TINY, **fields)
    found = selected(method, q, k, v)
    mask, rows, keys = found.dense_mask(), torch.arange(n_k - n_q, n_k).unsqueeze(-1), torch.arange(n_k)
    must = ((rows - keys < method.window) | (keys < method.sinks)) & (keys <= rows)
    assert bool((mask | ~must).all())
    assert torch.equal(found.pairs(), mask.sum((-1, -2)))
    # beside sinks, window and the block's own reach: at most top_k keys
    most = method.sinks + method.window + method.block_q + method.block_k + method.top_k
    assert int(mask.sum(-1).max()) <= most
    assert (attend(q, k, v, found).out - attend(q, k, v, found, impl="reference").out).abs().max() < 1e-12


def test_a_strong_region_is_found_and_each_query_head_chooses() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (0.1 * torch.randn(1, h, 512, 16, generator=generator) for h in (2, 1, 1))
    for head, begin in enumerate((60, 220)):
        q[0, head, 400:, head] += 3
        k[0, 0, begin : begin + 96, head] += 3
    found = selected(HiP(top_k=96, block_q=16, window=16, sinks=2, dense_layers=0), q, k, v).coverage()[0, :, -1]
    assert found[0, 60:156].float().mean() > 0.9 and found[1, 220:316].float().mean() > 0.9 and found[0, 220:316].float().mean() < 0.1


def test_first_layers_last_rows_and_single_queries_are_dense() -> None:
    q, k, v = random_qkv(96, 96)
    ran: list[Selection | None] = []
    for layer in (0, 2, 3):
        HiP(top_k=8, window=5, sinks=3).attend(context(q, k, v, layer=layer, layers=8, ran=ran), q, k, v)
    replace(TINY).attend(context(q[:, :, -1:], k, v, ran=ran), q[:, :, -1:], k, v)
    assert ran[0] is ran[1] is ran[3] is None and ran[2] is not None
    opened = selected(replace(TINY, dense_rows=10), q, k, v).dense_mask()
    assert bool((opened[:, :, -10:].sum(-1) == torch.arange(87, 97)).all())


def test_no_value_from_the_future() -> None:
    q, k, v = random_qkv(96, 96)
    other = v.clone()
    other[:, :, 60:] = 7.0
    a, b = (TINY.attend(context(q, k, x), q, k, x) for x in (v, other))
    assert torch.equal(a[:, :, :60], b[:, :, :60]) and not torch.equal(a[:, :, 60:], b[:, :, 60:])


@pytest.mark.parametrize(("fields", "said"), [
    ({"top_k": 0}, "top_k=0"), ({"sinks": -1}, "sinks=-1"), ({"refresh": 0}, "refresh=0"), ({"window": 1.5}, "window=1.5"),
    ({"stride_q": 65}, "more than block_q=64"), ({"stride_k": 3}, "more than block_k=2"),
    ({"top_k": 4, "block_k": 8}, "less than one block"),
])  # fmt: skip
def test_wrong_fields_are_refused_in_one_sentence(fields: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        HiP(**fields)
    assert "\n" not in str(caught.value)


def test_spec_round_trip() -> None:
    assert build("hip(top_k=256, refresh=1)").spec == "hip(top_k=256, refresh=1)" and build("hip") == HiP()


# -- decoding ------------------------------------------------------------------------------------------------------------


def test_decoding_searches_every_few_steps_and_reads_again_in_between() -> None:
    q, k, v = random_qkv(40, 120)
    method = replace(TINY, refresh=4)
    ctx = replace(context(q, k, v), phase="decode")
    masks: list[Tensor] = []
    for i in range(12):
        n = 81 + i
        found = method.select(ctx, q[:, :, i : i + 1], k[:, :, :n], v[:, :, :n])
        assert (found.n_q, found.n_k) == (1, n)
        mask = found.dense_mask()[:, :, 0]
        assert mask[..., :3].all() and mask[..., n - 5 :].all()
        masks.append(mask)
    for i in range(1, 12):
        older = masks[i - 1].shape[-1]
        again = torch.equal(masks[i][..., :older], masks[i - 1])
        # searched when the number of keys reaches a multiple of 4; in between what was read is read again, and the new key
        assert again == ((81 + i) % 4 != 0), i
        assert again is False or bool(masks[i][..., older:].all())


def test_decoding_finds_what_the_prompt_s_search_finds() -> None:
    q, k, v = random_qkv(1, 120)
    method = replace(TINY, block_q=1, stride_q=1)
    ctx = replace(context(q, k, v), phase="decode")
    assert torch.equal(method.select(ctx, q, k, v).dense_mask(), selected(method, q, k, v).dense_mask())


@pytest.mark.slow
def test_generation_by_searching() -> None:
    """Dense prefill and HiP in decoding, the configuration that keeps retrieval; guesses taken back, beams, opened is dense.

    A search at every step: the pocket model copies byte by byte, and a choice that is read again misses the next byte.
    """
    ids, answers = prompts(1023, (0.3, 0.7))
    spec = "hip(top_k=256, window=64, dense_layers=0, refresh=1)"
    with saccade.attach(pocket(), decode=spec) as handle, torch.no_grad():
        out = pocket().generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=2)
        density = handle.stats().decode_density
        guessed = pocket().generate(ids[:1, :300], max_new_tokens=8, do_sample=False, pad_token_id=0, prompt_lookup_num_tokens=4)
    texts = [bytes(max(0, token - 3) for token in row) for row in out[:, ids.shape[1] :].tolist()]
    assert all(a.startswith(b[: len(a)]) for a, b in zip(answers, texts, strict=True)), texts
    assert density is not None and density < 0.4
    assert guessed.shape[1] == 308
    with saccade.attach(pocket(), decode="hip(top_k=4096)"), torch.no_grad():
        opened = pocket().generate(ids[:, :300], max_new_tokens=4, do_sample=False, num_beams=2, pad_token_id=0)
    assert torch.equal(opened, pocket().generate(ids[:, :300], max_new_tokens=4, do_sample=False, num_beams=2, pad_token_id=0))


def test_rewinding_forgets_a_later_search() -> None:
    q, k, v = random_qkv(40, 120)
    method, ctx = replace(TINY, refresh=4), replace(context(q, k, v), phase="decode")
    assert method.rewind(ctx, 5) == 5
    first = method.select(ctx, q[:, :, :1], k[:, :, :96], v[:, :, :96]).dense_mask()
    assert method.rewind(ctx, 96) == 96 and "found" in ctx.state
    assert method.rewind(ctx, 90) == 90 and "found" not in ctx.state
    assert torch.equal(method.select(ctx, q[:, :, :1], k[:, :, :96], v[:, :, :96]).dense_mask(), first)


# -- the pocket model ----------------------------------------------------------------------------------------------------


def test_needles_are_found() -> None:
    ids, answers = prompts(1023, (0.3, 0.7))
    found, density = hits(ids, answers, "hip(top_k=256, window=128, dense_layers=0)")
    assert found == 2 and density < 0.75
