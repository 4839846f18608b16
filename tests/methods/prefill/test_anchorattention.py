"""AnchorAttention (anchorattention, 2505.23520): the claims of the paper, on constructed maps and on the pocket model."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.methods.cache.needles import pocket, prompts
from tests.methods.prefill.planted import context, hits, planted, selected
from torch import Tensor

from saccade.attach import capture
from saccade.core import Selection
from saccade.core.mass import covered_mass
from saccade.methods import build
from saccade.methods.prefill.anchorattention import AnchorAttention
from saccade.ops import attend
from saccade.parts.anchor import row_maxima

SHAPES = [(96, 96), (100, 100), (50, 100), (37, 100), (5, 9), (128, 130)]
GRIDS = [(4, 2, 1, 1), (4, 3, 2, 0), (8, 2, 0, 1), (3, 2, 1, 2)]  # block, step, initial, local


def random_qkv(n_q: int, n_k: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, n_q, 16), (2, 2, n_k, 16), (2, 2, n_k, 16))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    return scale * q, k, v


def ranges(method: AnchorAttention, n_q: int, n_k: int) -> tuple[Tensor, Tensor]:
    """First and local keys of each row, and the keys in between, `(n_q, n_k)` bool each, written down row by row."""
    first, b = method.initial * method.block, method.block
    anchor, middle = torch.zeros(2, n_q, n_k, dtype=torch.bool)
    for i in range(n_q):
        place, start = i + n_k - n_q, i // (method.step * b) * method.step * b + n_k - n_q
        dense = i >= max(0, n_q - method.tail) // (method.step * b) * method.step * b
        for j in range(place + 1):
            anchor[i, j] = dense or j < first or j >= start - method.local * b
            middle[i, j] = not anchor[i, j]
    return anchor, middle


# -- the card's evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
@pytest.mark.parametrize(("block", "step", "initial", "local"), GRIDS)
def test_infinite_theta_is_dense_and_minus_infinite_is_sink_and_local(
    n_q: int, n_k: int, block: int, step: int, initial: int, local: int
) -> None:
    q, k, v = random_qkv(n_q, n_k)
    method = AnchorAttention(theta=math.inf, block=block, step=step, initial=initial, local=local)
    assert selected(method, q, k, v).density() == 1.0
    assert (method.attend(context(q, k, v), q, k, v) - attend(q, k, v).out).abs().max() < 1e-12
    for tail in (0, 1, 13):
        closed = replace(method, theta=-math.inf, tail=tail)
        assert torch.equal(selected(closed, q, k, v).dense_mask()[0, 0], ranges(closed, n_q, n_k)[0])


def test_recall_and_kept_keys_grow_with_theta() -> None:
    q, k, v = random_qkv(256, 256, scale=3.0)
    found = [selected(AnchorAttention(theta=theta, block=8, step=2), q, k, v) for theta in (-1.0, 1.0, 3.0, 5.0, 8.0)]
    masks = [s.dense_mask() for s in found]
    assert all(bool((b | ~a).all()) for a, b in pairwise(masks))
    recall = [float(covered_mass(s, q, k, 0.25).mean()) for s in found]
    assert all(a.density() < b.density() for a, b in pairwise(found)) and recall == sorted(recall)
    assert recall[0] < 0.7 < 0.95 < recall[-1]


def test_stripes_reach_a_recall_with_fewer_keys_than_blocks() -> None:
    """Five strong columns, one every few blocks: single keys hold the mass, whole blocks cost a block for each."""
    columns = [41, 97, 170, 233, 330]
    q, k, v = planted(448, [columns], [[0, 1]], column=9.0, diagonal=9.0)
    method = AnchorAttention(theta=4.0, block=16, step=2)
    stripes = selected(method, q, k, v, 1.0)
    anchors = selected(replace(method, theta=-math.inf), q, k, v, 1.0)
    mask = torch.zeros(1, 1, 28, 28, dtype=torch.bool)
    mask[..., [c // 16 for c in columns]] = True
    blocks = anchors | Selection.from_block_mask(mask, block_q=16, block_k=16, n_q=448, n_k=448)
    kept = [float(covered_mass(s, q, k, 1.0).mean()) for s in (anchors, stripes, blocks)]
    assert kept[0] < 0.6 and kept[1] > 0.95 and kept[1] > kept[2] - 0.02
    extra = [int((s.pairs() - anchors.pairs()).sum()) for s in (stripes, blocks)]
    assert extra[0] < extra[1] / 8
    listed = stripes.tokens[0, 0, -1, : int(stripes.token_counts[0, 0, -1])].tolist()
    assert listed == columns


@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
@pytest.mark.parametrize(("block", "step", "initial", "local"), GRIDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_kept_keys_are_those_of_the_inequality(
    n_q: int, n_k: int, block: int, step: int, initial: int, local: int, softcap: float | None
) -> None:
    """For at least one block of the group, and no key that satisfies it for none."""
    q, k, v = random_qkv(n_q, n_k)
    method = AnchorAttention(theta=0.3, block=block, step=step, initial=initial, local=local)
    ctx = replace(context(q, k, v), softcap=softcap)
    found = method.select(ctx, q, k, v)
    anchor, middle = ranges(method, n_q, n_k)
    keys = k.repeat_interleave(3, dim=1)
    logits = q @ keys.mT * 0.25
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    maxima = logits.masked_fill(~anchor, -torch.inf).amax(-1)
    expected = anchor.expand(2, 6, -1, -1).clone()
    group = block * step
    for start in range(0, n_q - n_q % group, group):
        hit = torch.zeros(2, 6, n_k, dtype=torch.bool)
        for begin in range(start, start + group, block):
            rows = slice(begin, begin + block)
            score = (q[:, :, rows].mean(2, keepdim=True) @ keys.mT).squeeze(2) * 0.25
            score = score if softcap is None else softcap * torch.tanh(score / softcap)
            hit |= score + 0.3 >= maxima[:, :, rows].mean(-1, keepdim=True)
        expected[:, :, start : start + group] |= hit.unsqueeze(2) & middle[start : start + group]
    assert torch.equal(found.dense_mask().expand(expected.shape), expected)
    assert (found.pairs() == expected.sum((-1, -2))).all()  # no key is counted twice


# -- the passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
@pytest.mark.parametrize(("block", "step", "initial", "local"), GRIDS)
def test_the_resumed_softmax_is_one_softmax(n_q: int, n_k: int, block: int, step: int, initial: int, local: int) -> None:
    q, k, v = random_qkv(n_q, n_k)
    method = AnchorAttention(theta=0.3, block=block, step=step, initial=initial, local=local)
    ran: list[Selection | None] = []
    resumed = method.resumed(context(q, k, v, ran=ran), q, k, v)
    whole = attend(q, k, v, selected(method, q, k, v), impl="reference", return_lse=True)
    assert resumed.lse is not None and whole.lse is not None
    assert (resumed.out - whole.out).abs().max() < 1e-12 and (resumed.lse - whole.lse).abs().max() < 1e-12
    assert (method.attend(context(q, k, v), q, k, v) - whole.out).abs().max() < 1e-12
    passes = [s.dense_mask() for s in ran if s is not None]
    assert not (passes[0] & passes[-1]).any() if len(passes) == 2 else len(passes) == 1


@pytest.mark.parametrize(("n_q", "n_k"), [(96, 96), (37, 100)])
@pytest.mark.parametrize("sizes", GRIDS)
def test_row_maxima_see_neither_the_future_nor_keys_that_are_not_there(n_q: int, n_k: int, sizes: tuple[int, int, int, int]) -> None:
    """All logits are negative, so that a key of zeros would be the best; later keys have higher ones."""
    q, k, _ = random_qkv(n_q, n_k)
    q, k = q.abs(), -k.abs() / torch.arange(1, n_k + 1).unsqueeze(-1)
    method = AnchorAttention(block=sizes[0], step=sizes[1], initial=sizes[2], local=sizes[3])
    grid = method._grid(q, k)
    if not grid.groups:
        return
    found = row_maxima(q, k, grid, scale=0.25)
    logits = 0.25 * q @ k.repeat_interleave(3, dim=1).mT
    best = logits.masked_fill(~ranges(method, n_q, n_k)[0], -torch.inf).amax(-1)
    assert torch.allclose(found, best[:, :, : n_q - grid.rest], rtol=1e-12, atol=0)


def test_row_maxima_are_float32_for_half_precision() -> None:
    q, k, _ = random_qkv(64, 64, torch.bfloat16)
    grid = AnchorAttention(block=8, step=2)._grid(q, k)
    found = row_maxima(q, k, grid, scale=0.25)
    assert found.dtype == torch.float32
    assert torch.equal(found, row_maxima(q.float(), k.float(), grid, scale=0.25))


def test_no_value_from_the_future() -> None:
    q, k, v = random_qkv(96, 96)
    method, other = AnchorAttention(theta=1.0, block=4, step=2), v.clone()
    other[:, :, 60:] = 7.0
    a, b = (method.attend(context(q, k, x), q, k, x) for x in (v, other))
    assert torch.equal(a[:, :, :60], b[:, :, :60]) and not torch.equal(a[:, :, 60:], b[:, :, 60:])


@pytest.mark.parametrize(("field", "value"), [
    ("theta", math.nan), ("theta", True), ("block", 0), ("step", 0), ("initial", -1), ("local", 1.5), ("tail", -1),
])  # fmt: skip
def test_wrong_fields_are_refused_in_one_sentence(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^anchorattention\({field}=") as caught:
        AnchorAttention(**{field: value})
    assert "\n" not in str(caught.value)


def test_spec_round_trip() -> None:
    for spec in ("anchorattention(theta=8.0, block=64)", "anchorattention(theta=1e999)", "anchorattention(theta=-1e999)"):
        assert build(spec).spec == spec
    assert build("anchorattention") == AnchorAttention()


# -- the pocket model ----------------------------------------------------------------------------------------------------


def test_mass_follows_theta_on_the_pocket_model() -> None:
    ids, _ = prompts(1023, (0.5,))
    with capture(pocket()) as layers, torch.no_grad():
        pocket()(ids, use_cache=False)
    for layer in (layers[4], layers[5]):
        kept, density = [], []
        for theta in (2.0, 5.0, 8.0):
            found = selected(AnchorAttention(theta=theta, block=32, step=4), layer.q, layer.k, layer.v)
            kept.append(float(found.mass(layer.q, layer.k).mean()))
            density.append(found.density())
        assert kept == sorted(kept) and density == sorted(density) and density[0] < 0.5
        assert kept[-1] > 0.9


def test_needles_are_found() -> None:
    ids, answers = prompts(1023, (0.3, 0.7))
    found, density = hits(ids, answers, "anchorattention(theta=6.0, block=32, step=4, tail=64)")
    assert found == 2 and density < 0.6
