"""DeltaLLM (deltallm, 2507.19608): the claims of the card, on constructed keys and on the pocket model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.methods.cache.needles import pocket, prompts
from tests.methods.prefill.planted import context, hits, selected
from torch import Tensor

import saccade
from saccade.attach import capture
from saccade.core import Selection
from saccade.methods import build
from saccade.methods.prefill import deltallm
from saccade.methods.prefill.deltallm import DeltaLLM
from saccade.ops import attend
from saccade.parts.deltas import delta_code, delta_scores, rebuilt

N = 300
SMALL = DeltaLLM(theta=0.5, window=20, restart=64)


def drifting(n_q: int, n_k: int, dtype: torch.dtype = torch.float32, pace: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that move by about `pace` in every channel from token to token."""
    generator = torch.Generator().manual_seed(0)
    q, v = (torch.randn(2, h, n, 16, generator=generator, dtype=torch.float64) for h, n in ((6, n_q), (2, n_k)))
    steps = torch.randn(2, 2, n_k, 16, generator=generator, dtype=torch.float64)
    return q.to(dtype), (pace * steps).cumsum(2).to(dtype), v.to(dtype)


def exactly(q: Tensor, k: Tensor, v: Tensor, hat: Tensor, window: int) -> Tensor:
    """The equation: exact keys in the window, rebuilt ones before it, one softmax."""
    rows, keys = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None], torch.arange(k.shape[2])
    k, v, hat = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v, hat))
    logits = torch.where(rows - keys < window, q @ k.mT, q @ hat.mT) * q.shape[-1] ** -0.5
    return logits.masked_fill(keys > rows, -torch.inf).softmax(-1) @ v


# -- the code ------------------------------------------------------------------------------------------------------------


def test_the_code_is_the_recursion() -> None:
    keys = drifting(1, 90, torch.float64)[1][0, 0]
    found = delta_code(keys, 0.5, 32)
    sent = [0.0] * 16
    for j in range(90):
        for c in range(16):
            x = float(keys[j, c]) - (0.0 if j % 32 == 0 else sent[c])
            moved = j % 32 == 0 or abs(x) > 0.5
            assert float(found[j, c]) == (x if moved else 0.0)
            sent[c] = float(keys[j, c]) if moved else sent[c]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("theta", [0.0, 0.3, 2.0])
def test_no_element_is_off_by_more_than_theta(theta: float, dtype: torch.dtype) -> None:
    keys = drifting(1, 1000, dtype)[1]
    hat = rebuilt(delta_code(keys, theta, 256), 256)
    rounding = torch.finfo(hat.dtype).eps * 256 * float(keys.abs().max())
    assert float((hat - keys).abs().max()) <= theta + rounding
    # a code that compared with the previous key, not with what was sent, would drift away
    assert theta == 0 or float((hat - keys).abs().max()) > 0.8 * theta


@pytest.mark.parametrize("theta", [0.2, 1.0])
def test_scores_are_off_by_at_most_theta_times_the_query(theta: float) -> None:
    q, k, _ = drifting(N, N, torch.float64)
    scores = delta_scores(q[:, :2], delta_code(k, theta, 64), 64)
    off = (scores - q[:, :2] @ k.mT).abs()
    assert bool((off <= theta * q[:, :2].abs().sum(-1, keepdim=True) + 1e-9).all())
    assert float(off.max()) > 0.1 * theta


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_scores_from_deltas_are_those_of_the_rebuilt_keys(n: int) -> None:
    q, k, _ = drifting(5, n, torch.float64)
    deltas = delta_code(k, 0.4, 64)
    assert torch.allclose(delta_scores(q[:, :2], deltas, 64), q[:, :2] @ rebuilt(deltas, 64).mT, rtol=0, atol=1e-11)


def test_constant_keys_send_the_first_one_only() -> None:
    keys = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(0)).expand(1, 2, 200, 16)
    assert float((delta_code(keys, 0.1, 256) == 0).double().mean()) == 199 / 200
    assert float((delta_code(keys, 0.1, 50) == 0).double().mean()) == 49 / 50


def test_more_is_zero_the_higher_theta() -> None:
    keys = drifting(1, 1000)[1]
    shares = [float((delta_code(keys, theta, 256) == 0).double().mean()) for theta in (0.0, 0.1, 0.3, 1.0, 3.0)]
    assert shares == sorted(shares) and shares[0] < 0.01 and shares[-1] > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prefix_has_the_same_deltas_bit_by_bit(dtype: torch.dtype) -> None:
    """What decoding would add token by token is what a prompt at once has."""
    keys = drifting(1, 150, dtype)[1]
    whole = delta_code(keys, 0.4, 64)
    for n in (1, 2, 63, 64, 65, 128, 149):
        assert torch.equal(delta_code(keys[:, :, :n], 0.4, 64), whole[:, :, :n])


# -- attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"theta": 0.0}, {"window": N}, {"window": 1.0}], ids=str)
@pytest.mark.parametrize("n_q", [N, 40])
def test_opened_equals_dense(fields: dict[str, float], n_q: int) -> None:
    q, k, v = drifting(n_q, N)
    exact = attend(q.double(), k.double(), v.double()).out
    rounding = (attend(q, k, v).out - exact).abs().max()
    ran: list[Selection | None] = []
    out = replace(SMALL, **fields).attend(context(q, k, v, ran=ran), q, k, v)
    assert ran == [None] and (out - exact).abs().max() <= 2 * rounding + 1e-6
    # nor is the way through the deltas any other when every change is sent
    method = replace(SMALL, theta=0.0)
    through = method._read(context(q, k, v), q, k, v, delta_code(k[:, :, : N - 20], 0.0, 64), 20)
    assert (through - exact).abs().max() <= 4 * rounding + 1e-6


@pytest.mark.parametrize("pairs", [1, 6 * N * 2 * 37, 1 << 30])
@pytest.mark.parametrize("n_q", [N, 83, 1])
@pytest.mark.parametrize("window", [1, 20, 250])
def test_attention_is_the_equation(n_q: int, window: int, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if pairs == 1 and n_q == N:
        n_q = 9  # one row at a time is slow
    monkeypatch.setitem(deltallm.PAIRS, "cpu", pairs)
    q, k, v = drifting(n_q, N, torch.float64)
    method = replace(SMALL, window=window)
    out = method.attend(context(q, k, v), q, k, v)
    hat = rebuilt(delta_code(k, 0.5, 64), 64)
    assert torch.allclose(out, exactly(q, k, v, hat, window), rtol=0, atol=1e-12)
    assert not torch.allclose(out, exactly(q, k, v, k, window), rtol=0, atol=1e-3)


def test_only_deltas_of_older_keys_are_read() -> None:
    """Older keys reach the output through their deltas alone: a change below the threshold is invisible, one above it is not."""
    q, k, v = drifting(1, N, torch.float64)
    deltas = delta_code(k, 0.5, 64)
    unsent = (deltas == 0)[0, 0, 100].nonzero()[0]
    nudged = k.clone()
    nudged[0, 0, 100, unsent] = rebuilt(deltas, 64)[0, 0, 100, unsent] + 0.01
    out, same = (SMALL.attend(context(q, x, v), q, x, v) for x in (k, nudged))
    assert torch.equal(out, same)
    nudged[0, 0, 100, unsent] += 5.0
    assert not torch.allclose(out, SMALL.attend(context(q, nudged, v), q, nudged, v))
    nudged = k.clone()
    nudged[0, 0, N - 5, 0] += 0.01  # in the window every change counts
    assert not torch.equal(out, SMALL.attend(context(q, nudged, v), q, nudged, v))


def test_single_queries_one_after_the_other_give_the_same() -> None:
    q, k, v = drifting(N, N, torch.float64)
    whole = SMALL.attend(context(q, k, v), q, k, v)
    for i in (0, 19, 20, 63, 64, 150, N - 1):
        part = q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1]
        assert torch.allclose(SMALL.attend(context(*part), *part), whole[:, :, i : i + 1], rtol=0, atol=1e-12)


def test_nothing_from_the_future() -> None:
    q, k, v = drifting(N, N, torch.float64)
    others = [torch.cat([x[:, :, :120], torch.randn_like(x[:, :, 120:])], 2) for x in (q, k, v)]
    a, b = SMALL.attend(context(q, k, v), q, k, v), SMALL.attend(context(*others), *others)
    assert torch.equal(a[:, :, :120], b[:, :, :120]) and not torch.equal(a[:, :, 120:], b[:, :, 120:])


def test_the_work_reported_is_the_number_of_products() -> None:
    q, k, v = drifting(N, N)
    counted: list[float] = []
    SMALL.attend(replace(context(q, k, v), count=counted.append), q, k, v)
    sent = (delta_code(k, 0.5, 64) != 0).sum(-1).double()
    rows, keys = torch.arange(N)[:, None], torch.arange(N)
    recent = (rows - keys < 20) & (keys <= rows)
    older = keys <= rows - 20
    products = sum(float((recent * 16).sum() + (older * sent[b, h]).sum()) for b in range(2) for h in range(2))
    assert counted == [pytest.approx(products / 4 / 16)]
    assert 0.2 < counted[0] / (N * (N + 1) / 2) < 0.9


def test_every_pair_is_read() -> None:
    q, k, v = drifting(50, N)
    assert selected(SMALL, q, k, v).density() == 1.0


@pytest.mark.parametrize(("field", "value"), [
    ("theta", -0.1), ("theta", float("inf")), ("theta", True), ("window", 0), ("window", 1.5), ("restart", 0), ("restart", 2.0),
])  # fmt: skip
def test_wrong_fields_are_refused_in_one_sentence(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^deltallm\({field}=") as caught:
        DeltaLLM(**{field: value})
    assert "\n" not in str(caught.value)


def test_spec_round_trip() -> None:
    spec = "deltallm(theta=0.25, window=0.5)"
    assert build(spec).spec == spec and build("deltallm") == DeltaLLM()


# -- the pocket model ----------------------------------------------------------------------------------------------------


def test_the_error_on_the_pocket_model_follows_theta() -> None:
    ids, _ = prompts(767, (0.5,))
    with capture(pocket()) as layers, torch.no_grad():
        pocket()(ids, use_cache=False)
    for layer in (layers[0], layers[5]):
        errors = []
        for theta in (0.25, 1.0, 4.0):
            out = saccade.attention(layer.q, layer.k, layer.v, method=DeltaLLM(theta=theta))
            errors.append(float((out - layer.out).norm() / layer.out.norm()))
        assert errors == sorted(errors) and errors[0] < 0.03 and errors[1] < 0.2


@pytest.mark.slow
def test_needles_are_found_with_less_than_half_the_products() -> None:
    ids, answers = prompts(1023, (0.3, 0.7))
    found, density = hits(ids, answers, "deltallm")
    assert found == 2 and density < 0.55
