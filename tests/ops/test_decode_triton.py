"""The decode kernels against the reference: on the GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade
from saccade.core import Partial, Selection
from saccade.ops import decode
from saccade.ops.decode import Packed, decode_quantised
from saccade.ops.quant import hadamard
from tests.ops.marks import long_when_interpreted
from tests.ops.poison import poison

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in three parts that are combined: what is this short is read at once otherwise."""
    from saccade.ops.decode.triton import launch, packed

    for module in (launch, packed):
        monkeypatch.setattr(module, "splits", lambda *_: 3)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def wide(*xs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in xs)


def check(got: Partial, exact: Partial, plain: Partial, logit: float = 0.0) -> None:
    """At most twice the error of plain torch in the same dtype; lse as well, and 0 and -inf where there is no key.

    logit: the error of one logit, where an error common to all of them has to be allowed to lse.
    """
    assert got.lse is not None and exact.lse is not None and plain.lse is not None
    assert got.out.dtype == plain.out.dtype and got.lse.dtype == torch.float32
    allowed = 2 * float((plain.out.double() - exact.out).norm()) + 1e-6 * max(1.0, float(exact.out.norm()))
    assert float((got.out.double() - exact.out).norm()) <= allowed
    there = exact.lse > -torch.inf
    assert torch.equal(got.lse > -torch.inf, there)
    assert bool((got.out[~there] == 0).all())
    plain_error = max(float((plain.lse.double() - exact.lse)[there].norm()), logit * int(there.sum()) ** 0.5)
    allowed = 2 * plain_error + 1e-5 * (1 + float(exact.lse[there].norm()))
    assert float((got.lse.double() - exact.lse)[there].norm()) <= allowed


def compare(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> None:
    results = []
    for xs, impl in (((q, k, v), "triton"), (wide(q, k, v), "reference"), ((q, k, v), "cpu")):
        results.append(decode(*xs, *args, return_lse=True, impl=impl, **kwargs))
        if impl == "triton":
            assert saccade.last_run().impl == "triton"
    check(*results)


# -- every key ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim", "kv_heads", "group", "n"), [(64, 64, 2, 3, 150), (80, 48, 1, 4, 70), (128, 96, 2, 1, 1)])
def test_all_keys(dtype: torch.dtype, dim: int, value_dim: int, kv_heads: int, group: int, n: int) -> None:
    q, k = random(0, 2, kv_heads * group, 1, dim, dtype=dtype), random(1, 2, kv_heads, n, dim, dtype=dtype)
    compare(q, k, random(2, 2, kv_heads, n, value_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_combine(split: None, dtype: torch.dtype) -> None:
    compare(*(random(i, 1, h, m, 64, dtype=dtype) for i, (h, m) in enumerate([(4, 1), (2, 300), (2, 300)])))


def test_many_splits_combine(monkeypatch: pytest.MonkeyPatch) -> None:
    from saccade.ops.decode.triton import launch

    monkeypatch.setattr(launch, "splits", lambda *_: 21)
    compare(*(random(i, 1, 1, m, 48) for i, m in enumerate([2, 1300, 1300])))


@pytest.mark.parametrize("options", [{"softcap": 2.0, "scale": 0.7}, {"causal": True, "softcap": 30.0}], ids=str)
def test_options(split: None, options: dict[str, object]) -> None:
    compare(random(0, 2, 4, 5, 64), random(1, 2, 2, 140, 64), random(2, 2, 2, 140, 64), **options)


def test_sixteen_queries_of_a_wide_group_take_several_tiles() -> None:
    compare(random(0, 1, 6, 16, 256), random(1, 1, 1, 40, 256), random(2, 1, 1, 40, 256), causal=True)


def test_strides() -> None:
    q = random(0, 2, 3, 4, 64).transpose(1, 2)[:, :, :1]
    k = random(1, 2, 90, 2, 64).transpose(1, 2)[:, :, 5:]
    v = random(2, 2, 2, 64, 85).transpose(2, 3)
    compare(q, k, v)


def test_lengths(split: None) -> None:
    q, k, v = random(0, 3, 4, 3, 64), random(1, 3, 2, 150, 64), random(2, 3, 2, 150, 64)
    lengths = torch.tensor([150, 0, 67], dtype=torch.int32, device=DEVICE)
    for x in (k, v):
        x[2, :, 67:] = torch.nan
        x[1] = torch.nan
    compare(q, k, v, lengths=lengths)
    compare(q, k, v, lengths=lengths, causal=True)


@pytest.mark.parametrize("kind", [torch.int32, None], ids=str)
def test_ragged(split: None, kind: torch.dtype | None) -> None:
    offsets = [0, 40, 40, 110, 111]
    given = offsets if kind is None else torch.tensor(offsets, dtype=kind, device=DEVICE)
    compare(random(0, 2, 4, 2, 64), random(1, 111, 64), random(2, 111, 64), offsets=given, kv_heads=2)


@pytest.mark.parametrize("page", [16, 10])
def test_pages(page: int) -> None:
    pages = -(-150 // page)
    q, k, v = random(0, 2, 4, 1, 64), random(1, 3 * pages, page, 2, 64), random(2, 3 * pages, page, 2, 64)
    order = torch.randperm(3 * pages, generator=torch.Generator().manual_seed(0))[: 2 * pages].view(2, -1)
    k[[i for i in range(3 * pages) if i not in order]] = torch.nan
    table = order.to(DEVICE, torch.int32)
    compare(q, k, v, block_table=table)
    compare(q, k, v, block_table=table, lengths=torch.tensor([150, 33], device=DEVICE))
    heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    compare(q, heads_first, v, block_table=table)


# -- selections --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "dtype"), [(1, torch.float16), (2, torch.bfloat16), (6, torch.float32)])
def test_selected_pages(split: None, heads: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(heads)
    mask = torch.rand(2, heads, 1, 10, generator=g) < 0.5
    s = Selection.from_block_mask(mask.to(DEVICE), block_q=1, block_k=16, n_q=1, n_k=150)
    compare(*(random(i, 2, h, m, 64, dtype=dtype) for i, (h, m) in enumerate([(6, 1), (2, 150), (2, 150)])), s)


@pytest.mark.parametrize(("batch", "heads", "block_q", "causal"), [(1, 1, 1, True), (2, 2, 3, False), (2, 4, 2, True)])
def test_mixed_lists_for_several_queries(batch: int, heads: int, block_q: int, causal: bool) -> None:
    g = torch.Generator().manual_seed(heads)
    tiles = -(-3 // block_q)
    starts = torch.randint(0, 3, (batch, heads, tiles, 6), generator=g) + torch.arange(6) * 20
    tokens = torch.randint(0, 150, (batch, heads, tiles, 30), generator=g)
    counts = torch.randint(0, 31, (batch, heads, tiles), generator=g)
    weight = torch.randn(tokens.shape, generator=g)
    s = Selection.from_parts(
        n_q=3, n_k=150, block_q=block_q, block_k=12, starts=starts.to(DEVICE), tokens=tokens.to(DEVICE), token_counts=counts.to(DEVICE),
        log_weight=weight.to(DEVICE), causal=causal,
    )  # fmt: skip
    q, k, v = (random(i, 2, h, m, 64) for i, (h, m) in enumerate([(4, 3), (2, 150), (2, 150)]))
    options = {"softcap": 3.0, "lengths": torch.tensor([150, 60], device=DEVICE)} if causal else {}
    compare(q, k, v, s, **options)


def test_selected_from_pages(split: None) -> None:
    g = torch.Generator().manual_seed(0)
    s = Selection.from_token_mask((torch.rand(2, 4, 1, 160, generator=g) < 0.3).to(DEVICE), block_q=1, n_q=1, block_k=4)
    table = torch.randperm(20, generator=g).view(2, 10).to(DEVICE, torch.int32)
    compare(random(0, 2, 4, 1, 64), random(1, 20, 16, 2, 64), random(2, 20, 16, 2, 64), s, block_table=table)


def test_empty_lists() -> None:
    s = Selection.from_block_mask(torch.zeros(1, 2, 1, 5, dtype=torch.bool, device=DEVICE), block_q=1, block_k=16, n_q=1, n_k=80)
    got = decode(*(random(i, 1, 2, m, 64) for i, m in enumerate([1, 80, 80])), s, return_lse=True, impl="triton")
    assert not got.out.any() and bool((got.lse == -torch.inf).all())


def test_no_keys_at_all() -> None:
    got = decode(random(0, 1, 2, 1, 64), random(1, 1, 2, 0, 64), random(2, 1, 2, 0, 64), return_lse=True, impl="triton")
    assert not got.out.any() and bool((got.lse == -torch.inf).all())


def test_nothing_but_the_listed_keys_is_read() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (random(i, 2, h, m, 64) for i, (h, m) in enumerate([(4, 1), (2, 150), (2, 150)]))
    s = Selection.from_token_mask((torch.rand(2, 2, 1, 150, generator=g) < 0.3).to(DEVICE), block_q=1, n_q=1, block_k=4)
    want = decode(q, k, v, s, impl="triton").out
    unread = ~s.dense_mask()[:, :, 0]
    k[unread], v[unread] = torch.nan, torch.inf
    assert torch.equal(decode(q, k, v, s, impl="triton").out, want)


# -- the way in --------------------------------------------------------------------------------------------------------------


def test_the_same_bits_every_time(split: None) -> None:
    q, k, v = (random(i, 2, h, m, 64, dtype=torch.bfloat16) for i, (h, m) in enumerate([(4, 1), (2, 150), (2, 150)]))
    a, b = (decode(q, k, v, return_lse=True, impl="triton") for _ in range(2))
    assert torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


@long_when_interpreted
def test_compiles_in_one_graph() -> None:
    q, k, v = (random(i, 1, h, m, 32) for i, (h, m) in enumerate([(2, 1), (1, 50), (1, 50)]))
    s = Selection.from_token_mask(torch.ones(1, 1, 1, 50, dtype=torch.bool, device=DEVICE), block_q=1, n_q=1, block_k=4)
    packed = Packed.of(k, 4, group=16)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        every, listed = decode(q, k, v, impl="triton"), decode(q, k, v, s, impl="triton")
        return every.out, listed.out, decode_quantised(q.half(), packed, packed, impl="triton").out

    torch._dynamo.reset()
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(got, run(q, k, v), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"dim": 300}, "head dims of 1 to 256"),
        ({"requires_grad": True}, "no backward"),
    ],
)
def test_says_why_it_cannot_run(change: dict[str, object], message: str) -> None:
    dim = int(change.get("dim", 64))
    q = torch.zeros(1, 2, 1, dim, dtype=change.get("dtype", torch.float32), device=DEVICE)
    k = torch.zeros_like(q)
    q.requires_grad_(bool(change.get("requires_grad", False)))
    with pytest.raises(ValueError, match=message):
        decode(q, k, k, impl="triton")
    if DEVICE == "cuda":
        decode(q, k, k)
        assert saccade.last_run().impl == "cpu"


# -- few bits ----------------------------------------------------------------------------------------------------------------


def compare_packed(q: Tensor, k: Tensor, v: Tensor, keys: dict[str, object], values: dict[str, object], **kwargs: object) -> None:
    """Against the same numbers written out: at most twice the error of plain torch attention over them in the dtype of q."""
    K, V = Packed.of(k, **keys), Packed.of(v, **values)
    got = decode_quantised(q, K, V, return_lse=True, impl="triton", **kwargs)
    assert saccade.last_run().impl == "triton"
    exact = decode_quantised(q.double(), K, V, return_lse=True, impl="reference", **kwargs)
    # where keys are rotated the product is taken over rotated numbers, and rounds as those do
    rows = hadamard(q) if K.rotated else q
    plain = decode(rows, K.read_stored(dtype=q.dtype), V.read_stored(dtype=q.dtype), return_lse=True, impl="cpu", **kwargs)
    check(got, exact, Partial(hadamard(plain.out) if V.rotated else plain.out, plain.lse), _logit_error(rows, K))


def _logit_error(q: Tensor, keys: Packed) -> float:
    """Root mean square error of plain logits. Tokens share parameters, so what these lose in rounding does not average out over tokens."""
    rows = q.double().unflatten(1, (keys.codes.shape[1], -1)).flatten(2, 3)
    stored, exact = (keys.read_stored(dtype=dtype).double() for dtype in (q.dtype, torch.float64))
    return float((rows @ (stored - exact).mT).square().mean().sqrt()) * q.shape[-1] ** -0.5


CHANNEL = {"bits": 4, "granularity": "channel", "group": 64}
TOKEN = {"bits": 4, "granularity": "token", "group": 64}


@pytest.mark.parametrize(
    ("bits", "dtype"), [(2, torch.float16), (3, torch.bfloat16), (4, torch.bfloat16), (4, torch.float16), (8, torch.bfloat16)]
)
def test_channel_keys_and_token_values(bits: int, dtype: torch.dtype) -> None:
    q, k, v = (random(i, 2, h, m, 64, dtype=dtype) for i, (h, m) in enumerate([(4, 1), (2, 100), (2, 100)]))
    offset = 3 * random(9, 64, dtype=dtype)
    compare_packed(q, k + offset, v, {**CHANNEL, "bits": bits}, {**TOKEN, "bits": bits})


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ({**TOKEN, "group": 32}, {**CHANNEL, "group": 16}),
        ({**CHANNEL, "group": 1000}, {**TOKEN, "group": 16}),
        ({**CHANNEL, "symmetric": True}, {**TOKEN, "symmetric": True}),
        ({**TOKEN, "symmetric": True, "bits": 8}, {**CHANNEL, "symmetric": True, "bits": 5}),
        ({**CHANNEL, "bits": 3, "nonuniform": True}, {**TOKEN, "bits": 3, "nonuniform": True}),
        ({**CHANNEL, "outliers": 0.03}, {**TOKEN, "outliers": 0.03}),
        ({**TOKEN, "outliers": 0.03, "nonuniform": True}, {**CHANNEL, "outliers": 0.02}),
        ({**TOKEN, "rotate": True}, {**TOKEN, "rotate": True}),
    ],
    ids=str,
)
@long_when_interpreted
def test_forms_of_packing(keys: dict[str, object], values: dict[str, object]) -> None:
    q, k, v = (random(i, 1, h, m, 64, dtype=torch.bfloat16) for i, (h, m) in enumerate([(4, 2), (2, 100), (2, 100)]))
    compare_packed(q, k, v, keys, values)


def test_packed_with_odd_dims_lengths_and_cap(split: None) -> None:
    q, k = random(0, 2, 3, 3, 80, dtype=torch.float16), random(1, 2, 1, 90, 80, dtype=torch.float16)
    v = random(2, 2, 1, 90, 48, dtype=torch.float16)
    lengths = torch.tensor([90, 0], dtype=torch.int32, device=DEVICE)
    compare_packed(q, k, v, {**CHANNEL, "bits": 3}, {**TOKEN, "group": 48}, lengths=lengths, softcap=4.0)


def test_codebooks_of_each_channel(split: None) -> None:
    q = random(0, 1, 4, 1, 32, dtype=torch.float16)
    codes = torch.randint(0, 256, (1, 2, 70, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.uint8)
    packed = Packed(codes=codes, bits=4, dim=32, codebook=random(1, 2, 32, 16, dtype=torch.float16))
    got = decode_quantised(q, packed, packed, return_lse=True, impl="triton")
    x = packed.read_stored(dtype=torch.float16)
    check(got, decode(*wide(q, x, x), return_lse=True, impl="reference"), decode(q, x, x, return_lse=True, impl="cpu"))


def test_constant_channels_and_tokens_have_no_scale() -> None:
    q, k, v = (random(i, 1, h, m, 32, dtype=torch.bfloat16) for i, (h, m) in enumerate([(2, 1), (2, 70), (2, 70)]))
    k[..., 3] = 2.0
    v[:, :, 5] = 1.5
    compare_packed(q, k, v, {**CHANNEL, "group": 1000}, {**TOKEN, "group": 32})
    compare_packed(q, k, v, {**TOKEN, "group": 32}, {**CHANNEL, "group": 1000})


@pytest.mark.parametrize(
    ("q_dtype", "keys", "message"),
    [
        (torch.float32, CHANNEL, "not torch.float32"),
        (torch.float16, {**CHANNEL, "group": 20}, "multiples of 16"),
        (torch.float16, {**TOKEN, "group": 8}, "8 groups of 8"),
        (torch.float16, {**CHANNEL, "bits": 1}, "1 bit"),
    ],
)
def test_says_what_packing_it_does_not_take(q_dtype: torch.dtype, keys: dict[str, object], message: str) -> None:
    x = random(0, 1, 1, 50, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=message):
        decode_quantised(x[:, :, :1].to(q_dtype), Packed.of(x, **keys), Packed.of(x, 4), impl="triton")


@pytest.mark.parametrize("n", [2, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_butterfly(n: int, dtype: torch.dtype) -> None:
    x = random(0, 5, n, dtype=dtype)
    got, want = hadamard(x, impl="triton"), hadamard(x.double(), impl="torch")
    assert float((got.double() - want).abs().max()) <= 2 * torch.finfo(dtype).eps * float(want.abs().max())


@pytest.mark.gpu
def test_a_tail_that_grows_is_no_new_kernel() -> None:
    """One tile of all the newest keys has another size at every step; compiling for each would cost a second a step."""
    from saccade.ops.decode.triton.listed import listed

    def compiled() -> int:
        return sum(len(caches[0]) for caches in listed.device_caches.values())

    q, counts = torch.randn(1, 2, 1, 64, device=DEVICE), []
    for tail in (5, 6, 7, 9, 11, 13):
        k = torch.randn(1, 2, 100 + tail, 64, device=DEVICE)
        starts = torch.full((1, 1, 1, 1), 100, dtype=torch.int32, device=DEVICE)
        s = Selection.from_parts(n_q=1, n_k=100 + tail, block_q=1, block_k=tail, starts=starts)
        decode(q, k, k, s, impl="triton")
        counts.append(compiled())
    assert len(set(counts)) == 1
