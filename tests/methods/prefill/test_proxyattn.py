"""ProxyAttn (proxyattn, 2509.24745): the claims of the paper, on constructed maps and on the pocket model."""

from __future__ import annotations

import math

import pytest
import torch
from tests.methods.cache.needles import prompts
from tests.methods.prefill.planted import context, hits, selected
from torch import Tensor

from saccade.core import Budget, Mass, Selection
from saccade.methods import build
from saccade.methods.prefill.proxyattn import ProxyAttn
from saccade.ops import attend
from saccade.ops.estimate import pooled_probabilities, pooled_scores
from saccade.parts.proxy_heads import mean_heads

SHAPES = [(96, 96), (100, 100), (50, 100), (37, 100), (128, 130)]


def random_qkv(n_q: int, n_k: int, heads: int = 6, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, n_q, 16), (2, kv_heads, n_k, 16), (2, kv_heads, n_k, 16))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return 2 * q, k, v


def probabilities(q: Tensor, k: Tensor, offset: int | None = None) -> Tensor:
    n_q, n_k = q.shape[2], k.shape[2]
    offset = n_k - n_q if offset is None else offset
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * 0.25
    return logits.masked_fill(torch.arange(n_k) > torch.arange(n_q).unsqueeze(-1) + offset, -torch.inf).softmax(-1)


def block_maxima(p: Tensor, block: int) -> Tensor:
    p = torch.nn.functional.pad(p, (0, -p.shape[-1] % block, 0, -p.shape[-2] % block))
    return p.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).amax((-1, -3))


# -- the card's evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gamma_one_is_dense(n_q: int, n_k: int, groups: int) -> None:
    q, k, v = random_qkv(n_q, n_k)
    method = ProxyAttn(gamma=1.0, groups=groups, block=8, least=0)
    found = selected(method, q, k, v)
    assert found.density() == 1.0
    assert (attend(q, k, v, found).out - attend(q, k, v).out).abs().max() < 1e-12
    ran: list[Selection | None] = []
    method.attend(context(q, k, v, ran=ran), q, k, v)
    assert ran == [None]


@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
def test_a_group_a_head_without_stride_scores_the_exact_block_maximum(n_q: int, n_k: int) -> None:
    """The mask is then the best blocks of the true attention, for each head."""
    q, k, v = random_qkv(n_q, n_k)
    method = ProxyAttn(gamma=0.6, groups=6, stride=1, block=8, least=0)
    assert torch.equal(selected(method, q, k, v).dense_mask(), oracle(q, k, probabilities(q, k), method))


def oracle(q: Tensor, k: Tensor, p: Tensor, method: ProxyAttn) -> Tensor:
    """The paper's steps 4 and 5 over block maxima of `p`, row by row, as a dense mask."""
    n_q, n_k, b = q.shape[2], k.shape[2], method.block
    maxima, last = block_maxima(p, b), probabilities(q, k)[:, :, -b:].mean(2)
    by_block = torch.nn.functional.pad(last, (0, -n_k % b)).unflatten(-1, (-1, b)).sum(-1)
    shares = Budget(Mass(method.gamma)).counts(by_block).double() / by_block.shape[-1]
    mask = torch.zeros(*q.shape[:2], n_q, n_k, dtype=torch.bool)
    rows, keys = torch.arange(n_k - n_q, n_k).unsqueeze(-1), torch.arange(n_k)
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            for tile in range(math.ceil(n_q / b)):
                end = min((tile + 1) * b, n_q)
                first, last_row = tile * b + n_k - n_q, end - 1 + n_k - n_q
                visible = last_row // b + 1
                count = max(math.ceil(round(float(shares[batch, head]) * visible, 9)), math.ceil(method.least / b))
                scores = maxima[batch, head, tile, :visible]
                order = torch.sort(scores, descending=True, stable=True).indices[:count]
                for block in {*order.tolist(), 0, *range(first // b, last_row // b + 1)}:
                    mask[batch, head, tile * b : end, block * b : (block + 1) * b] = True
    return mask & (keys <= rows)


@pytest.mark.parametrize("groups", [1, 2])
def test_identical_heads_get_the_oracle_mask(groups: int) -> None:
    q, k, v = random_qkv(96, 96, heads=1, kv_heads=1)
    q, k, v = q.expand(-1, 6, -1, -1), k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1)
    method = ProxyAttn(gamma=0.5, groups=groups, stride=1, block=8, least=0)
    assert torch.equal(selected(method, q, k, v).dense_mask(), oracle(q, k, probabilities(q, k), method))


def test_planted_needles_rank_high_by_token_maxima() -> None:
    """Twelve needles one key wide in 32 blocks of 64: the largest probability ranks their block high, the mean of the block does not."""
    generator = torch.Generator().manual_seed(0)
    token, pooled = 0, 0
    for _ in range(12):
        q, k = (torch.randn(1, 1, 2048, 64, generator=generator) for _ in range(2))
        key, row = (int(torch.randint(0, n, (), generator=generator)) for n in (1900, 64))
        q[0, 0, 1984 + row] += 1.5 * k[0, 0, key]
        ranks = []
        for scores in (pooled_probabilities(q, k, 64, 64, reduce="max"), pooled_scores(q, k, 64, 64)):
            of_row = scores[0, 0, -1]
            ranks.append(int((of_row > of_row[key // 64]).sum()))
        token, pooled = token + (ranks[0] < 8), pooled + (ranks[1] < 8)
    assert token >= 10 and pooled <= 6, (token, pooled)


# -- the definition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), [(96, 96), (50, 98), (37, 101)])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_what_is_read_is_the_paper_s(n_q: int, n_k: int, groups: int) -> None:
    """Mean heads, every second query and key at its own position, block maxima, a budget for each head, a least number of blocks."""
    q, k, v = random_qkv(n_q, n_k)
    method = ProxyAttn(gamma=0.5, groups=groups, stride=2, block=8, least=17)
    mean_q = q.unflatten(1, (groups, -1)).mean(2)
    mean_k = k.unflatten(1, (groups, -1)).mean(2) if groups < 3 else k
    strided = probabilities(mean_q[:, :, ::2], mean_k[:, :, ::2], (n_k - n_q) // 2)
    whole = torch.zeros(2, groups, n_q, n_k, dtype=torch.float64)
    whole[:, :, ::2, ::2] = strided
    found = selected(method, q, k, v)
    p = whole.repeat_interleave(6 // groups, 1)
    assert torch.equal(found.dense_mask(), oracle(q, k, p, method))
    assert torch.equal(found.pairs(), found.dense_mask().sum((-1, -2)))


def test_heads_have_their_own_budgets() -> None:
    """One head looks at a single key, the other everywhere."""
    q, k, v = random_qkv(128, 128, heads=2, kv_heads=1)
    q[:, 0], q[:, 1] = 0.0, 0.0
    q[:, 0, :, 0] = 40.0
    k[:, :, :, 0] = 0.0
    k[:, :, 50, 0] = 2.0
    found = selected(ProxyAttn(gamma=0.9, stride=2, block=8, least=0), q, k, v).density_by_head()
    assert bool((found[:, 0] < 0.5).all()) and bool((found[:, 1] > 0.85).all())


def test_the_least_is_read_and_short_prompts_are_dense() -> None:
    q, k, v = random_qkv(96, 96)
    found = selected(ProxyAttn(gamma=0.01, stride=2, block=8, least=40), q, k, v)
    visible = torch.arange(1, 13)
    assert bool((found.start_counts >= visible.clamp(max=5)).all()) and bool((found.start_counts <= visible.clamp(max=7)).all())
    ran: list[Selection | None] = []
    ProxyAttn(gamma=0.5, least=96).attend(context(q, k, v, ran=ran), q, k, v)
    ProxyAttn(gamma=0.5, least=0).attend(context(q[:, :, -1:], k, v, ran=ran), q[:, :, -1:], k, v)
    assert ran == [None, None]


def test_mean_heads() -> None:
    q, k, _ = random_qkv(5, 7)
    a, b = mean_heads("x", q, k, 1)
    assert torch.equal(a[:, 0], q.mean(1)) and torch.equal(b[:, 0], k.mean(1))
    a, b = mean_heads("x", q, k, 6)
    assert a is q and b is k
    assert mean_heads("x", q.bfloat16(), k.bfloat16(), 2)[0].dtype == torch.bfloat16
    for groups in (4, 3):
        with pytest.raises(ValueError, match=rf"x\(groups={groups}\) does not divide"):
            mean_heads("x", q, k, groups)


def test_no_value_from_the_future() -> None:
    q, k, v = random_qkv(96, 96)
    method, other = ProxyAttn(gamma=0.5, stride=2, block=8, least=0), v.clone()
    other[:, :, 60:] = 7.0
    a, b = (method.attend(context(q, k, x), q, k, x) for x in (v, other))
    assert torch.equal(a[:, :, :60], b[:, :, :60]) and not torch.equal(a[:, :, 60:], b[:, :, 60:])


@pytest.mark.parametrize(("fields", "said"), [
    ({"gamma": 0.0}, r"gamma=0\.0"), ({"gamma": True}, "gamma=True"), ({"groups": 0}, "groups=0"), ({"least": -1}, "least=-1"),
    ({"stride": 3}, "does not divide blocks of 128"), ({"block": 0}, "block=0"),
])  # fmt: skip
def test_wrong_fields_are_refused_in_one_sentence(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^proxyattn\(.*{said}|{said}") as caught:
        ProxyAttn(**fields)
    assert "\n" not in str(caught.value)


def test_spec_round_trip() -> None:
    assert build("proxyattn(gamma=0.9, groups=4)").spec == "proxyattn(gamma=0.9, groups=4)" and build("proxyattn") == ProxyAttn()


# -- the pocket model ----------------------------------------------------------------------------------------------------


def test_needles_are_found() -> None:
    ids, answers = prompts(1023, (0.3, 0.7))
    found, density = hits(ids, answers, "proxyattn(gamma=0.9, least=256, block=32)")
    assert found == 2 and density < 0.5
