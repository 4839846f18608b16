"""estimate: the kernel of tile maxima from few-bit codes, against the reference; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from saccade.ops import estimate
from saccade.ops.gpu import has_triton

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(heads: int, kv_heads: int, n_q: int, n_k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys with means of their own, and something to compare rows with."""
    g = torch.Generator().manual_seed(n_q + n_k + dim)
    b = 1 if kv_heads == 1 else 2
    q, k, base = (torch.randn(b, *x, generator=g) for x in ((heads, n_q, dim), (kv_heads, n_k, dim), (heads, n_q)))
    return (q + 0.5).to(DEVICE), (k - torch.randn(dim, generator=g)).to(DEVICE), base.to(DEVICE)


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    """Only a value half way between two codes may go either way, which moves a logit by one step at most; all others are the same."""
    assert got.shape == want.shape and not bool(got.isnan().any())
    finite = want.isfinite()
    assert torch.equal(got[~finite], want[~finite]) and bool(got[finite].isfinite().all())
    away = (got - want)[finite].abs()
    assert float((away > 2e-4).float().mean()) < 0.01 and float(away.max()) < 0.2


# heads, key heads, queries, keys, dim, tile of queries, of keys, group, bits: tails on both sides, chunks that begin late, tiles of a
# warp's 16, 32 and 64 rows and of more, tiles of fewer keys than a step shares and of more than a step of the walk
CASES = [
    (2, 1, 300, 300, 32, 64, 32, 32, 4), (2, 2, 130, 170, 32, 16, 16, 32, 4), (4, 2, 60, 70, 32, 32, 16, 8, 4),
    (2, 1, 70, 333, 48, 32, 64, 16, 4),
    (1, 1, 257, 257, 32, 128, 32, 1, 4), (2, 1, 90, 40, 32, 64, 32, 32, 8), (1, 1, 45, 200, 64, 16, 128, 64, 8),
    (1, 1, 3, 77, 32, 64, 8, 4, 4),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_maxima_of_codes_in_all_shapes(case: tuple[int, ...]) -> None:
    heads, kv_heads, n_q, n_k, dim, block_q, block_k, group, bits = case
    q, k, base = tensors(heads, kv_heads, n_q, n_k, dim)
    for causal in (True, False):
        found = [
            estimate.tile_maxima(
                q, k, block_q, block_k, bits=bits, group=group, relative_to=base, causal=causal, impl=impl,
            )
            for impl in ("triton", "reference")
        ]  # fmt: skip
        near(*found)


@pytest.mark.parametrize(("n_q", "n_k"), [(300, 300), (130, 517)])
@pytest.mark.parametrize(("block_q", "block_k"), [(64, 32), (128, 16)])
def test_what_lies_beyond_the_reach_is_not_asked(n_q: int, n_k: int, block_q: int, block_k: int) -> None:
    q, k, base = tensors(2, 1, n_q, n_k, 32)
    base[:, 0, 5] = -torch.inf  # a row that saw nothing is compared as it is
    reach = (torch.arange(-(-n_q // block_q), device=DEVICE) * block_q + n_k - n_q - 50).clamp(min=0) // block_k * block_k
    got = estimate.tile_maxima(q, k, block_q, block_k, bits=4, group=32, relative_to=base, reach=reach, impl="triton")
    clean = base.masked_fill(base == -torch.inf, 0.0)
    want = estimate.tile_maxima(q, k, block_q, block_k, bits=4, group=32, relative_to=clean, reach=reach, impl="reference")
    asked = torch.arange(want.shape[-1], device=DEVICE) * block_k < reach[:, None]
    assert bool(asked.any()) and bool((want[..., ~asked] == -torch.inf).all()) and bool((got[..., ~asked] == -torch.inf).all())
    near(got, want)


@pytest.mark.parametrize("how", [{}, {"bits": 4, "softcap": 2.0}, {"bits": 4, "smooth": False}], ids=str)
def test_every_estimate_keeps_to_its_reach(how: dict[str, float]) -> None:
    q, k, _ = tensors(2, 1, 60, 70, 16)
    reach = torch.tensor([0, 16, 32, 48], device=DEVICE)
    asked = torch.arange(5, device=DEVICE) * 16 < reach[:, None]
    whole = estimate.tile_maxima(q, k, 16, 16, **how)
    for impl in ("triton", "reference"):
        found = estimate.tile_maxima(q, k, 16, 16, reach=reach, impl=impl, **how)
        assert bool((found[..., ~asked] == -torch.inf).all())
        near(found[..., asked], whole[..., asked])


def test_few_programs_share_the_keys() -> None:
    """A short chunk before many keys: the keys of a run of queries go to several programs."""
    q, k, base = tensors(1, 1, 20, 900, 32)
    found = [estimate.tile_maxima(q, k, 16, 32, bits=4, group=32, relative_to=base, impl=impl) for impl in ("triton", "reference")]
    near(*found)


def test_float8_and_int8_codes_give_the_same_maxima() -> None:
    """Sums of products of codes up to 7 are whole numbers that float8 products hold: bit by bit, up to the largest sums that there are."""
    from saccade.ops.estimate.triton import maxima, quantise

    for dim, extreme in ((256, True), (128, False)):
        q, k, base = tensors(1, 1, 64, 96, dim)
        if extreme:  # each code is 7 or -7, and some rows meet keys of their own sign
            q, k = q.sign(), k.sign()
            k[:, :, ::3] = q[:, :, :1]
        found = []
        for float8 in (True, False):
            if float8 and not quantise.multiplies_float8(q):
                pytest.skip("this GPU multiplies no float8")
            c = quantise.quantise_pair(q, k, 4, 1, True, float8)
            if extreme:
                c = c._replace(q=(q * 7).to(c.q.dtype), k=(k * 7).to(c.k.dtype))
            assert c.q.dtype == (torch.float8_e4m3fn if float8 else torch.int8)
            assert c.q_step is not None and c.k_step is not None and c.q_add is not None and c.k_add is not None
            found.append(maxima.maxima(c.q, c.k, base, c.q_step, c.k_step, c.q_add, c.k_add, None, 16, 8, 4, 1, True, 32, 0.1))
        assert torch.equal(*found)
        if extreme:
            ones = torch.ones_like(c.q_step)
            zeros = torch.zeros_like(c.q_add)
            size = maxima.maxima(c.q, c.k, None, ones, torch.ones_like(c.k_step), zeros, c.k_add * 0, None, 16, 8, 4, 1, False, 32, 1.0)
            assert size.max() == 49 * 256


def test_the_operators_trace() -> None:
    from saccade.ops.estimate.triton import maxima, quantise

    q, k, base = tensors(2, 1, 40, 50, 16)
    c = quantise.quantise_pair(q, k, 4, 8, True)
    reach = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    for given, limit in ((base, reach), (None, None)):
        args = (c.q, c.k, given, c.q_step, c.k_step, c.q_add, c.k_add, limit, 16, 8, 4, 8, True, 10, 1.0)
        torch.library.opcheck(maxima.maxima, args, test_utils=checks)
    for float8 in (True, False):
        torch.library.opcheck(quantise.quantise, (k, None, None, False, 4, 8, float8), test_utils=checks)


def test_a_wrong_reach_is_refused() -> None:
    q, k, _ = tensors(1, 1, 40, 40, 16)
    with pytest.raises(ValueError, match=r"tile_maxima: reach is \(2,\) on"):
        estimate.tile_maxima(q, k, 16, 16, bits=4, reach=torch.zeros(2, dtype=torch.int64, device=DEVICE))
