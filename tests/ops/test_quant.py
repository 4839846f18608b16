"""Quantisation: packed bytes hold what was put in, and restored numbers lie within half a step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.ops.quant import (
    affine_parameters,
    affine_quantise,
    codebook,
    codebook_decode,
    codebook_encode,
    dequantise,
    encode,
    hadamard,
    pack,
    pack_words,
    packed_bytes,
    split_outliers,
    symmetric_dequantise,
    symmetric_quantise,
    unpack,
    unpack_words,
    word_bytes,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
few = settings(max_examples=60, deadline=None)


def random_codes(seed: int, bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(*shape[:-1], 1, generator=generator).exp()
    return (torch.randn(*shape, generator=generator) * spread + torch.randn(*shape[:-1], 1, generator=generator)).to(dtype)


# -- packing -----------------------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 3), st.integers(0, 10**6))
def test_packing_and_unpacking_gives_every_code_back(bits: int, n: int, rows: int, seed: int) -> None:
    codes = random_codes(seed, bits, 2, rows, n)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, rows, packed_bytes(n, bits)) == (2, rows, -(-n * bits // 8))
    assert packed.untyped_storage().nbytes() == packed.numel()
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_lie_in_the_bytes_lowest_bit_first(bits: int) -> None:
    codes = random_codes(1, bits, 13)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    assert bytes(pack(codes, bits).tolist()) == stream.to_bytes(packed_bytes(13, bits), "little")


@pytest.mark.parametrize("bits", range(1, 9))
def test_views_pack_and_unpack_like_copies(bits: int) -> None:
    codes = random_codes(2, bits, 9, 6).T[1:, 1:]
    packed = pack(codes, bits)
    assert torch.equal(packed, pack(codes.contiguous(), bits))
    wide = torch.cat([packed, packed], -1)[..., packed.shape[-1] :]
    assert torch.equal(unpack(wide, bits, 8), codes)


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="code 4 does not fit 2 bits"):
        pack(torch.tensor([0, 4], dtype=torch.uint8), 2)
    with pytest.raises(TypeError, match="uint8"):
        pack(torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="bits=9"):
        pack(torch.tensor([0], dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="expected 3"):
        unpack(torch.zeros(4, dtype=torch.uint8), 3, 8)


# -- affine ------------------------------------------------------------------------------------------------------------------


def rounding(x: torch.Tensor) -> float:
    """What storing parameters in the dtype of x may add: one unit in the last place of the largest value, twice."""
    dtype = torch.float32 if x.dtype == torch.float32 else x.dtype
    return 4 * torch.finfo(dtype).eps * float(x.abs().max())


@few
@given(
    st.integers(1, 8), st.sampled_from(DTYPES), st.sampled_from([-1, 0, 1, (0, 2), (1, 2), (0, 1, 2)]), st.integers(0, 10**6)
)
def test_affine_error_is_at_most_half_a_step(bits: int, dtype: torch.dtype, dims: int | tuple[int, ...], seed: int) -> None:
    x = random_values(seed, 3, 5, 8, dtype=dtype)
    codes, scale, zero = affine_quantise(x, bits, dims)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 1 << bits
    assert scale.dtype == zero.dtype == dtype
    reduced = {d % 3 for d in ([dims] if isinstance(dims, int) else dims)}
    assert scale.shape == zero.shape == tuple(1 if d in reduced else n for d, n in enumerate(x.shape))
    error = (dequantise(codes, scale, zero, torch.float64) - x.double()).abs()
    assert bool((error <= scale.double() / 2 + rounding(x)).all())


@few
@given(st.integers(1, 8), st.integers(0, 10**6))
def test_both_ends_of_the_range_are_restored(bits: int, seed: int) -> None:
    x = random_values(seed, 4, 16)
    restored = dequantise(*affine_quantise(x, bits))
    for end in (x.argmin(-1, keepdim=True), x.argmax(-1, keepdim=True)):
        assert torch.allclose(restored.gather(-1, end), x.gather(-1, end), rtol=0, atol=rounding(x))


@few
@given(st.integers(1, 8), st.sampled_from(DTYPES), st.floats(-1e4, 1e4))
def test_constant_vectors_are_exact(bits: int, dtype: torch.dtype, value: float) -> None:
    x = torch.full((2, 7), value, dtype=torch.float64).to(dtype)
    codes, scale, zero = affine_quantise(x, bits)
    assert not scale.any() and not codes.any()
    assert torch.equal(dequantise(codes, scale, zero), x)


def test_more_bits_are_closer() -> None:
    x = random_values(3, 64, 128)
    errors = [float((dequantise(*affine_quantise(x, bits)) - x).norm()) for bits in range(1, 9)]
    assert all(a > 1.8 * b for a, b in pairwise(errors))


@few
@given(st.integers(1, 8), st.sampled_from([0, 1, 2]), st.integers(0, 10**6))
def test_groups_are_quantised_like_tensors_of_their_own(bits: int, dim: int, seed: int) -> None:
    x = random_values(seed, 6, 8, 4)
    size = x.shape[dim] // 2
    whole = affine_quantise(x, bits, dim, group=size)
    assert whole.scale.shape[dim] == 2
    alone = [affine_quantise(part.clone(), bits, dim) for part in x.split(size, dim)]
    assert torch.equal(whole.codes, torch.cat([a.codes for a in alone], dim))
    assert torch.equal(dequantise(*whole), torch.cat([dequantise(*a) for a in alone], dim))
    symmetric = symmetric_quantise(x, max(bits, 2), dim, group=size)
    alone = [symmetric_quantise(part.clone(), max(bits, 2), dim) for part in x.split(size, dim)]
    assert torch.equal(symmetric.codes, torch.cat([a.codes for a in alone], dim))
    expected = torch.cat([symmetric_dequantise(a.codes, a.scale, max(bits, 2)) for a in alone], dim)
    assert torch.equal(symmetric_dequantise(*symmetric, max(bits, 2)), expected)


def test_clipping_narrows_the_range_and_clamps_what_lies_beyond() -> None:
    x = torch.tensor([[-10.0, -1.0, 0.0, 1.0, 10.0]])
    codes, scale, zero = affine_quantise(x, 2, clip=0.5)
    assert float(zero) == -5.0 and float(scale) == pytest.approx(10 / 3)
    assert dequantise(codes, scale, zero)[0, [0, -1]].tolist() == [-5.0, 5.0]


def test_parameters_can_come_from_elsewhere() -> None:
    x = random_values(4, 3, 8)
    scale, zero = affine_parameters(x, 4)
    assert torch.equal(encode(x, scale, zero, 4), affine_quantise(x, 4).codes)
    # a range measured once serves other bits: one level above zero makes the step the range
    span, zero = affine_parameters(x, 1)
    codes = encode(x, span / 15, zero, 4)
    assert float((dequantise(codes, span / 15, zero) - x).abs().max()) <= float(scale.max()) / 2 + rounding(x)


# -- symmetric ---------------------------------------------------------------------------------------------------------------


@few
@given(st.integers(2, 8), st.sampled_from(DTYPES), st.integers(0, 10**6))
def test_symmetric_quantisation_keeps_zero_and_sign(bits: int, dtype: torch.dtype, seed: int) -> None:
    x = random_values(seed, 4, 9, dtype=dtype)
    x[:, 3] = 0
    codes, scale = symmetric_quantise(x, bits)
    restored = symmetric_dequantise(codes, scale, bits, torch.float64)
    assert not restored[:, 3].any()
    assert bool(((restored - x.double()).abs() <= scale.double() / 2 + rounding(x) * (1 << bits)).all())
    mirrored = symmetric_quantise(-x, bits)
    assert torch.equal(symmetric_dequantise(*mirrored, bits), -symmetric_dequantise(codes, scale, bits))


def test_symmetric_quantisation_of_zeros_is_exact() -> None:
    codes, scale = symmetric_quantise(torch.zeros(2, 5), 4)
    assert torch.equal(symmetric_dequantise(codes, scale, 4), torch.zeros(2, 5))


# -- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.randn(2, 4)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="not all finite"):
        affine_quantise(x, 4)
    with pytest.raises(ValueError, match="not all finite"):
        symmetric_quantise(x, 4)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match="bits=9"):
        affine_quantise(x, 9)
    with pytest.raises(ValueError, match="bits=1 "):
        symmetric_quantise(x, 1)
    with pytest.raises(ValueError, match="groups of 4"):
        affine_quantise(x, 4, group=4)
    with pytest.raises(ValueError, match="groups of 2"):
        affine_quantise(x, 4, (0, 1), group=2)
    with pytest.raises(ValueError, match="dims=2"):
        affine_quantise(x, 4, 2)
    with pytest.raises(ValueError, match="clip"):
        affine_quantise(x, 4, clip=0)
    with pytest.raises(TypeError, match="floating-point"):
        affine_quantise(torch.ones(3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="no values"):
        affine_quantise(torch.zeros(2, 0), 4)
    with pytest.raises(ValueError, match="do not fit codes"):
        dequantise(torch.zeros(2, 6, dtype=torch.uint8), torch.ones(2, 4), torch.ones(2, 4))


# -- words -------------------------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 10**6))
def test_words_give_every_code_back(bits: int, n: int, seed: int) -> None:
    codes = random_codes(seed, bits, 2, 3, n)
    packed = pack_words(codes, bits)
    assert packed.shape == (2, 3, word_bytes(n, bits)) and torch.equal(unpack_words(packed, bits, n), codes)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_words_of_bits_that_divide_16_are_the_packed_bytes(bits: int) -> None:
    codes = random_codes(0, bits, 5, 48)
    assert torch.equal(pack_words(codes, bits), pack(codes, bits))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_a_word_holds_whole_codes_lowest_first(bits: int) -> None:
    codes = random_codes(0, bits, 16 // bits)
    word = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    assert bytes(pack_words(codes, bits).tolist()) == word.to_bytes(2, "little")


def test_checks_of_values_can_be_left_out() -> None:
    assert pack(torch.tensor([4], dtype=torch.uint8), 2, check=False).shape == (1,)
    assert affine_quantise(torch.tensor([0.0, torch.inf]), 4, check=False).codes.shape == (2,)


# -- codebooks ---------------------------------------------------------------------------------------------------------------


def best_levels(x: list[float], weight: list[float], count: int) -> float:
    """The least weighted squared error of `count` levels, by trying every way to cut the sorted values."""
    order = sorted(range(len(x)), key=lambda i: x[i])

    def cost(a: int, b: int) -> float:
        mass = sum(weight[i] for i in order[a:b])
        mean = sum(weight[i] * x[i] for i in order[a:b]) / mass
        return sum(weight[i] * (x[i] - mean) ** 2 for i in order[a:b])

    best = [0.0] + [float("inf")] * len(x)
    for _ in range(count):
        best = [0.0] + [min(min(best[a] + cost(a, b) for a in range(b)), best[b]) for b in range(1, len(x) + 1)]
    return best[-1]


def squared_error(x: torch.Tensor, levels: torch.Tensor, weight: torch.Tensor | None = None) -> float:
    error = (codebook_decode(codebook_encode(x, levels), levels).double() - x.double()).square()
    return float((error if weight is None else error * weight).sum())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.booleans())
def test_codebooks_are_near_the_best_there_is(seed: int, weighted: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(40, generator=g).double(), torch.rand(40, generator=g).double() if weighted else torch.ones(40).double()
    best = best_levels(x.tolist(), weight.tolist(), 4)
    assert squared_error(x, codebook(x, 2, weight), weight) <= 2.0 * best  # k-means finds a local optimum


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_and_outliers_suit_heavy_tails(bits: int) -> None:
    """kvquant, evidence 2: uniform > non-uniform > uniform with outliers apart > both."""
    torch.manual_seed(0)
    x = torch.distributions.StudentT(4.0).sample((8192,))
    dense, _, indices = split_outliers(x, 0.01)
    inside = torch.ones_like(x).scatter(0, indices.long(), 0.0)
    uniform, apart = dequantise(*affine_quantise(x, bits)), dequantise(*affine_quantise(dense, bits))
    errors = [
        float((uniform - x).square().sum()), squared_error(x, codebook(x, bits)), float(((apart - x) * inside).square().sum()),
        squared_error(dense, codebook(dense, bits, inside), inside),
    ]  # fmt: skip
    assert errors[0] > 1.5 * errors[1] and errors[0] > 1.5 * errors[2]
    assert min(errors[1], errors[2]) > 1.1 * errors[3]


def test_codebooks_of_rows_are_their_own_and_deterministic() -> None:
    x = random_values(0, 3, 200)
    levels = codebook(x, 3)
    assert levels.shape == (3, 8) and torch.equal(levels, codebook(x, 3)) and torch.equal(levels, levels.sort(-1).values)
    assert all(torch.allclose(levels[i], codebook(x[i], 3), rtol=1e-6) for i in range(3))
    codes = codebook_encode(x, levels)
    nearest = (x.unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)
    assert torch.allclose((codebook_decode(codes, levels) - x).abs(), nearest, atol=1e-6)


def test_few_different_values_are_exact() -> None:
    x = torch.tensor([[3.0, -1.0, 3.0, -1.0, 7.0], [2.0] * 5])
    levels = codebook(x, 2)
    assert torch.allclose(codebook_decode(codebook_encode(x, levels), levels), x)


def test_codebooks_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="bits=9"):
        codebook(torch.zeros(3), 9)
    with pytest.raises(ValueError, match="nothing to fit"):
        codebook(torch.zeros(2, 0), 2)
    with pytest.raises(ValueError, match="one weight for each"):
        codebook(torch.zeros(2, 3), 2, torch.ones(3))


@few
@given(st.sampled_from(DTYPES), st.floats(0, 1), st.integers(0, 10**6))
def test_outliers_are_put_back_exactly(dtype: torch.dtype, share: float, seed: int) -> None:
    x = random_values(seed, 3, 40, dtype=dtype)
    dense, values, indices = split_outliers(x, share)
    assert values.shape == indices.shape == (3, round(share * 40))
    assert torch.equal(dense.scatter(-1, indices.long(), values), x)
    far = (x.double() - x.median(-1, keepdim=True).values.double()).abs()
    kept = torch.ones_like(far).scatter(-1, indices.long(), 0.0)
    if 0 < values.shape[-1] < 40 and dtype in (torch.float32, torch.float64):
        assert bool((far.gather(-1, indices.long()).amin(-1) >= (far * kept).amax(-1) - 1e-6).all())


# -- Hadamard ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 8, 128])
def test_hadamard_is_orthonormal_symmetric_and_its_own_inverse(n: int) -> None:
    h = hadamard(torch.eye(n, dtype=torch.float64))
    signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)], dtype=torch.float64)
    assert torch.allclose(h, signs * n**-0.5, atol=1e-12)
    x = random_values(0, 3, n, dtype=torch.float64)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-12)


def test_hadamard_spreads_outlier_channels() -> None:
    """akvq-vl, evidence 2: two channels 20 times larger, 2 bits per token."""
    k = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    k[:, [5, 77]] *= 20
    plain = float((dequantise(*affine_quantise(k, 2)) - k).norm() / k.norm())
    turned = hadamard(k)
    rotated = float((dequantise(*affine_quantise(turned, 2)) - turned).norm() / k.norm())
    assert rotated < plain / 1.5
    assert float(turned.abs().max() / turned.square().mean().sqrt()) < float(k.abs().max() / k.square().mean().sqrt()) / 2


def test_hadamard_refuses_what_is_no_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.zeros(3, 96))
    with pytest.raises(TypeError, match="floating-point"):
        hadamard(torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="not one of"):
        hadamard(torch.zeros(4), impl="fast")
