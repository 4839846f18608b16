"""Delta attention (delta-attention, 2505.11254): the claims of the paper, on constructed maps and on the pocket model."""

from __future__ import annotations

import pytest
import torch
from tests.methods.cache.needles import pocket, prompts
from tests.methods.prefill.planted import context, hits
from torch import Tensor

import saccade
from saccade.attach import capture
from saccade.attach.stats import computed_pairs
from saccade.core import Prefill, Selection
from saccade.methods import build
from saccade.methods.prefill.delta_attention import DeltaAttention
from saccade.methods.prefill.minference import MInference
from saccade.ops import attend
from saccade.parts.delta import anchor_rows, correct, reading_all
from saccade.parts.sink_window import SinkWindow

WINDOW = "streaming-llm(sinks=2, window=8, block=4)"
SHAPES = [(200, 200), (77, 200), (130, 131), (17, 60)]


def random_qkv(n_q: int, n_k: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, n_q, 16), (2, 2, n_k, 16), (2, 2, n_k, 16))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def run(method: Prefill, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return method.attend(context(q, k, v), q, k, v)


# -- the card's evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
def test_gamma_one_is_dense(n_q: int, n_k: int) -> None:
    q, k, v = random_qkv(n_q, n_k)
    assert torch.equal(run(DeltaAttention(base=WINDOW, gamma=1), q, k, v), attend(q, k, v).out)


@pytest.mark.parametrize("gamma", [2, 7, 16])
@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
def test_anchor_rows_and_the_tail_are_dense(n_q: int, n_k: int, gamma: int) -> None:
    q, k, v = random_qkv(n_q, n_k)
    dense, out = attend(q, k, v).out, run(DeltaAttention(base=WINDOW, gamma=gamma, tail=10), q, k, v)
    begin = max(0, n_q - n_q % gamma - max(10, gamma))
    rows = [i for i in range(n_q) if i % gamma == 0 or i >= begin]
    assert (out[:, :, rows] - dense[:, :, rows]).abs().max() < 1e-12
    # the earliest rows lie within sinks and window, where the base is dense too
    others = [i for i in range(40, n_q) if i not in rows]
    assert not others or (out[:, :, others] - dense[:, :, others]).abs().amax((0, 1, 3)).min() > 1e-3


@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
def test_rows_in_between_get_the_difference_of_the_one_before(n_q: int, n_k: int) -> None:
    q, k, v = random_qkv(n_q, n_k)
    sparse, dense = build_base(WINDOW).attend(context(q, k, v), q, k, v), attend(q, k, v).out
    out = run(DeltaAttention(base=WINDOW, gamma=16, tail=16), q, k, v)
    plain = run(DeltaAttention(base=WINDOW, gamma=16, tail=16, how="recompute"), q, k, v)
    for i in range(max(0, n_q - n_q % 16 - 16)):
        g = i // 16 * 16
        assert (out[:, :, i] - (sparse[:, :, i] + dense[:, :, g] - sparse[:, :, g])).abs().max() < 1e-12
        assert i == g or torch.equal(plain[:, :, i], sparse[:, :, i])


def build_base(spec: str) -> Prefill:
    return DeltaAttention(base=spec).sparse


@pytest.mark.parametrize("base", ["dense", "minference(offsets=1.0)", "streaming-llm(window=4096)"])
def test_a_dense_base_is_not_corrected(base: str) -> None:
    q, k, v = random_qkv(200, 200)
    out = run(DeltaAttention(base=base, gamma=16, tail=16), q, k, v)
    assert (out - attend(q, k, v).out).abs().max() < 1e-12


def ar1(autocorrelation: float, n: int = 1024, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that drift, `(1, 4, n, dim)`, over independent keys and values."""
    generator = torch.Generator().manual_seed(0)
    noise, k, v = (torch.randn(1, 4, n, dim, generator=generator) for _ in range(3))
    q = noise.clone()
    for i in range(1, n):
        q[:, :, i] = autocorrelation * q[:, :, i - 1] + (1 - autocorrelation**2) ** 0.5 * noise[:, :, i]
    return 2 * q, k, v


def distances(autocorrelation: float) -> tuple[float, float, float, float]:
    """(cosine to dense before, after, relative error before, after) the correction of a window of 128 keys."""
    q, k, v = ar1(autocorrelation)
    dense = attend(q, k, v).out
    base = "streaming-llm(sinks=0, window=128, block=1)"
    rows = slice(128, 1024 - 128)
    found = []
    for out in (run(build_base(base), q, k, v), run(DeltaAttention(base=base, gamma=32), q, k, v)):
        a, b = out[:, :, rows], dense[:, :, rows]
        found.append((float(torch.cosine_similarity(a, b, dim=-1).mean()), float((a - b).norm() / b.norm())))
    return found[0][0], found[1][0], found[0][1], found[1][1]


def test_ar1_queries_are_repaired() -> None:
    """Queries that drift slowly (0.995): the output turns towards dense attention and the error falls by about a quarter."""
    cosine, repaired, error, less = distances(0.995)
    assert cosine < 0.6 and repaired > cosine + 0.15
    assert less < 0.8 * error


def test_independent_queries_are_not() -> None:
    """What is missing at one row says nothing about the next: a correct repair makes the error larger."""
    _, _, error, more = distances(0.0)
    assert more > error


# -- the parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "gamma", "tail"), [(1000, 64, 128), (130, 64, 128), (100, 7, 3), (1, 4, 0), (64, 16, 16)])
def test_anchor_rows(n: int, gamma: int, tail: int) -> None:
    rows = anchor_rows(n, gamma, tail).tolist()
    last = n % gamma + max(tail, gamma)
    assert rows == sorted({*range(0, max(0, n - last), gamma), *range(max(0, n - last), n)})


@pytest.mark.parametrize("block", [1, 4, 64])
def test_dense_rows_read_everything_up_to_themselves(block: int) -> None:
    q, k, v = random_qkv(90, 100)
    rows = anchor_rows(90, 7, 9)
    places = rows + 10
    selection = reading_all(places, 100, block)
    out = attend(q[:, :, rows], k, v, selection, q_positions=places[None, None]).out
    assert (out - attend(q, k, v).out[:, :, rows]).abs().max() < 1e-12
    pairs = computed_pairs(len(rows), 100, selection, {"q_positions": places[None, None]})
    assert pairs == float((places + 1).sum()) == computed_pairs(len(rows), 100, None, {"q_positions": places[None, None]})


def test_half_precision_differences_are_taken_in_float32() -> None:
    sparse = torch.tensor([1.0, 3.0], dtype=torch.bfloat16).view(1, 1, 2, 1)
    dense = torch.tensor([1.0 + 2**-7], dtype=torch.bfloat16).view(1, 1, 1, 1)
    wide = correct(sparse.double(), dense.double(), torch.tensor([0]))
    out = correct(sparse, dense, torch.tensor([0]))
    assert out.dtype == torch.bfloat16 and torch.equal(out, wide.bfloat16())


@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
def test_the_static_pattern_is_sinks_and_a_window(n_q: int, n_k: int) -> None:
    q, k, v = random_qkv(n_q, n_k)
    found = SinkWindow(sinks=5, window=9, block=1).select(context(q, k, v), q, k, v)
    rows, keys = torch.arange(n_k - n_q, n_k).unsqueeze(-1), torch.arange(n_k)
    assert torch.equal(found.dense_mask()[0, 0], ((rows - keys < 9) | (keys < 5)) & (keys <= rows))


# -- the method ----------------------------------------------------------------------------------------------------------


def test_any_prefill_method_can_be_the_base() -> None:
    q, k, v = random_qkv(200, 200)
    for base in ("hip(top_k=16, window=12, dense_layers=0, block_q=16)", "minference(offsets=12, columns=8, near=4, sinks=2)"):
        ran: list[Selection | None] = []
        method = DeltaAttention(base=base, gamma=16, tail=16)
        out = method.attend(context(q, k, v, ran=ran), q, k, v)
        assert len(ran) == 2 and ran[1] is not None and ran[1].n_q == 200  # dense rows, then the base
        assert torch.isfinite(out).all()
    assert DeltaAttention(base=MInference(columns=8)).spec == "delta-attention(base='minference(columns=8)')"


@pytest.mark.parametrize("spec", ["delta-attention", "delta-attention(base='streaming-llm(sinks=4, window=2048)', gamma=32)"])
def test_spec_round_trip(spec: str) -> None:
    assert build(spec).spec == spec
    assert build("delta-attention").sparse == SinkWindow(sinks=1024, window=2048)


@pytest.mark.parametrize(("given", "said"), [
    ({"gamma": 0}, r"^delta-attention\(gamma=0\) is not"), ({"tail": -1}, r"^delta-attention\(tail=-1\) is not"),
    ({"how": "half"}, "is not 'delta' or 'recompute'"), ({"base": "snapkv"}, "snapkv acts on the cache phase"),
    ({"base": "minferense"}, "did you mean minference"), ({"base": "streaming-llm(sink=4)"}, "has no field 'sink'"),
    ({"base": "streaming-llm(window=0)"}, r"streaming-llm\(window=0\) is not"), ({"base": 3}, "is not a prefill method"),
])  # fmt: skip
def test_wrong_fields_are_refused_in_one_sentence(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        DeltaAttention(**given)
    assert "\n" not in str(caught.value)


def test_nothing_from_the_future() -> None:
    q, k, v = random_qkv(200, 200)
    method, others = DeltaAttention(base=WINDOW, gamma=16, tail=16), [x.clone() for x in (q, k, v)]
    for x in others:
        x[:, :, 120:] = torch.randn(x[:, :, 120:].shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    a, b = run(method, q, k, v), run(method, *others)
    assert (a[:, :, :120] - b[:, :, :120]).abs().max() < 1e-13 and not torch.equal(a[:, :, 120:], b[:, :, 120:])


# -- the pocket model ----------------------------------------------------------------------------------------------------


def test_density_counts_both_passes_against_one_dense_one() -> None:
    ids, _ = prompts(1023, (0.5,))
    with saccade.attach(pocket(), prefill="delta-attention(base='streaming-llm(sinks=64, window=128)', gamma=32, tail=0)") as handle:
        with torch.no_grad():
            pocket()(ids)
        density = handle.stats().prefill_density
    q = torch.empty(1, 1, 1024, 1)
    base = SinkWindow(sinks=64, window=128).select(context(q, q, q), q, q, q)
    rows = anchor_rows(1024, 32, 0)
    expected = (float(base.pairs()) + int((rows + 1).sum())) / base.visible_pairs()
    assert density == pytest.approx(expected)


def test_error_on_captured_queries_falls_with_closer_anchors() -> None:
    """Output error of sinks + window, all layers together, on the pocket model's own q, k, v.

    A byte's query differs from its neighbour's, so only close dense rows lower the error of this model (a large stride raises it).
    """
    ids, _ = prompts(1023, (0.5,))
    with capture(pocket()) as layers, torch.no_grad():
        pocket()(ids, use_cache=False)
    base = "streaming-llm(sinks=4, window=64, block=16)"
    errors = []
    for method in (build_base(base), *(DeltaAttention(base=base, gamma=gamma, tail=0) for gamma in (16, 4, 2, 1))):
        off = [(run(method, x.q, x.k, x.v) - x.out).square().sum() / x.out.square().sum() for x in layers]
        errors.append(float(torch.stack(off).mean().sqrt()))
    assert errors[1:] == sorted(errors[1:], reverse=True) and errors[-1] < 1e-5
    assert errors[3] < 0.85 * errors[0], errors


def test_the_base_finds_needles_once_repaired() -> None:
    ids, answers = prompts(1023, (0.3, 0.7))
    base = "streaming-llm(sinks=4, window=128)"
    lost, _ = hits(ids, answers, build_base(base))
    found, density = hits(ids, answers, f"delta-attention(base='{base}')")
    assert lost == 0 and found == 2 and density < 0.6
