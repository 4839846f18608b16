"""SALE (sale, 2505.24179): the claims of the paper, on constructed maps and on the pocket model."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.methods.cache.needles import pocket, prompts, streams
from tests.methods.prefill.planted import context, hits, selected
from torch import Tensor

import saccade
from saccade.attach import capture
from saccade.core import LayerContext, Plan, Selection
from saccade.core.mass import covered_mass
from saccade.methods import build
from saccade.methods.prefill.sale import CANDIDATES, SALE
from saccade.ops import attend
from saccade.ops.estimate import TileGrid, choose_top_k, pooled_scores, tile_maxima

SMALL = SALE(tau=0.5, local=32, segment=32, sinks=8, block_q=16, block_k=8, dense_below=0)


def random_qkv(n_q: int, n_k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 6, n_q, 16), (2, 2, n_k, 16), (2, 2, n_k, 16))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


def plan_of(taus: list[float]) -> Plan:
    return Plan(slug="sale", spec="sale", fingerprint="", tensors={"layer.0.tau": torch.tensor(taus, dtype=torch.float64)}, notes={})


# -- the card's evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), [(300, 300), (77, 300)])
def test_threshold_zero_equals_dense(n_q: int, n_k: int) -> None:
    """All heads at 0 run densely; one head at 0 among others reads every tile, in two passes."""
    q, k, v = random_qkv(n_q, n_k)
    exact = attend(q.double(), k.double(), v.double()).out
    rounding = (attend(q, k, v).out - exact).abs().max()
    ran: list[Selection | None] = []
    replace(SMALL, tau=0).attend(context(q, k, v, ran=ran), q, k, v)
    assert ran == [None] and selected(replace(SMALL, tau=0), q, k, v).density() == 1.0
    out = SMALL.attend(context(q, k, v, plan=plan_of([0, 9, 9, 9, 0, 9])), q, k, v)
    assert (out - exact)[:, [0, 4]].abs().max() <= 2 * rounding + 1e-6
    assert (out - exact)[:, [1, 2, 3, 5]].abs().amin() < (out - exact)[:, [1, 2, 3, 5]].abs().max() > 0.01


def estimates(q: Tensor, k: Tensor, *, smooth: bool = True, bits: int | None = 4, group: int = 1) -> Tensor:
    """Estimated logits without each row's mean, which no softmax sees."""
    logits = tile_maxima(q, k, 1, 1, bits=bits, smooth=smooth, group=group, causal=False)
    return logits - logits.mean(-1, keepdim=True)


def test_four_bits_estimate_the_logits() -> None:
    """Errors of about 0.1; an outlier channel in k and one in q harm the plain rounding only."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 512, 64, generator=generator) + torch.randn(1, 2, 1, 64, generator=generator)
    k = torch.randn(1, 1, 512, 64, generator=generator) + torch.randn(1, 1, 1, 64, generator=generator)
    exact, found = estimates(q, k, bits=None), estimates(q, k)
    assert 0.05 < (found - exact).norm() / exact.norm() < 0.15
    # a step for 32 tokens is wider than most of them need
    assert 0.12 < (estimates(q, k, group=32) - exact).norm() / exact.norm() < 0.18
    assert torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1] > 0.99
    k[..., 3] += 20
    q[..., 5] += 15
    exact = estimates(q, k, bits=None)
    errors = [float((estimates(q, k, smooth=smooth) - exact).norm() / exact.norm()) for smooth in (True, False)]
    assert errors[0] < 0.1 and errors[1] > 0.5, errors


def test_less_is_kept_the_higher_the_threshold() -> None:
    q, k, v = random_qkv(500, 500)
    kept = [selected(replace(SMALL, tau=tau), q, k, v).density_by_head() for tau in (0.05, 0.2, 0.8, 3.2)]
    assert all((a > b).all() for a, b in pairwise(kept))


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor, Tensor]:
    """A retrieving layer of the pocket model on a needle prompt of 2K tokens."""
    ids, _ = prompts(2047, (0.4,))
    with capture(pocket()) as layers, torch.no_grad():
        pocket()(ids, use_cache=False)
    return layers[5].q, layers[5].k, layers[5].v


def test_recall_beats_pooled_blocks_at_equal_density(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = layer
    own = selected(SALE(tau=0.1, dense_below=0), q, k, v)
    grid = TileGrid.of(q, k, 64, 32)
    method = SALE(dense_below=0)
    near = selected(replace(method, tau=1e9), q, k, v)
    forced = torch.zeros(1, q.shape[1], grid.rows, grid.columns + 1, dtype=torch.bool)
    forced = forced.scatter_(-1, near.starts.long() // 32, True)[..., : grid.columns]
    pooled = choose_top_k(pooled_scores(q, k, 64, 32), own.start_counts, grid, forced=forced)
    assert abs(pooled.density() - own.density()) < 0.01 and own.density() < 0.5
    masses = [covered_mass(s, q, k) for s in (own, pooled)]
    assert masses[0].mean() > masses[1].mean()
    # the question at the end asks for what lies far back, and each row gets what it asks for
    assert masses[0][..., -64:].mean() > masses[1][..., -64:].mean() + 0.02
    assert masses[0].amin(-1).mean() > 2 * masses[1].amin(-1).mean()


# -- the definition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k", "group"), [(150, 150, 1), (150, 150, 32), (83, 150, 8), (21, 150, 1)])
def test_what_is_read_is_the_equation(n_q: int, n_k: int, group: int) -> None:
    """Near keys, and tiles with a 4-bit weight above tau beside the near keys alone, brute force."""
    q, k, v = random_qkv(n_q, n_k, torch.float64)
    found = selected(replace(SMALL, group=group), q, k, v).dense_mask()
    rows, keys = torch.arange(n_k - n_q, n_k), torch.arange(n_k)
    first = torch.arange(n_q) // 16 * 16 + n_k - n_q
    reach = (first - 32).clamp(min=0) // 32 * 32
    visible = keys <= rows[:, None]
    near = ((keys < 8) | (keys >= reach[:, None])) & visible
    logits = q @ k.repeat_interleave(3, 1).mT * 0.25
    lse = logits.masked_fill(~near, -torch.inf).logsumexp(-1)

    def rounded(x: Tensor) -> Tensor:
        peaks = x.abs().amax(-1).split(group, dim=-1)
        step = torch.cat([peak.amax(-1, keepdim=True).expand(peak.shape) for peak in peaks], dim=-1).unsqueeze(-1) / 7
        return (x / step + 0.5).floor() * step

    q_mean, k_mean = q.mean(2, keepdim=True), k.mean(2, keepdim=True).repeat_interleave(3, 1)
    moved = k.repeat_interleave(3, 1) - k_mean
    four = (rounded(q - q_mean) @ rounded(moved).mT + q_mean @ moved.mT + q @ k_mean.mT) * 0.25
    heavy = ((four - lse.unsqueeze(-1)).exp() > 0.5) & visible
    tiles = torch.nn.functional.pad(heavy, (0, -n_k % 8, 0, -n_q % 16)).unflatten(2, (-1, 16)).unflatten(4, (-1, 8)).any(5).any(3)
    wanted = tiles.repeat_interleave(16, 2).repeat_interleave(8, 3)[:, :, :n_q, :n_k]
    assert torch.equal(found, (wanted | near) & visible)
    assert 0.2 < found.sum() / visible.expand_as(found).sum() < 0.95


def test_output_is_attention_over_the_selection() -> None:
    """Continued from the near keys, with nothing counted twice; masks differ between the query heads of a group."""
    q, k, v = random_qkv(300, 300, torch.float64)
    found = selected(SMALL, q, k, v)
    assert not torch.equal(found.dense_mask()[:, 0], found.dense_mask()[:, 1])
    expected = attend(q, k, v, found, impl="reference").out
    ran: list[Selection | None] = []
    assert (SMALL.attend(context(q, k, v, ran=ran), q, k, v) - expected).abs().max() < 1e-12
    assert len(ran) == 2 and ran[0] is not None and ran[1] is not None
    assert torch.equal(ran[0].pairs() + ran[1].pairs(), found.pairs())


def test_softcap_reaches_the_estimate() -> None:
    q, k, v = random_qkv(200, 200, torch.float64)
    ctx = replace(context(4 * q, k, v), softcap=2.0)
    plain = context(4 * q, k, v)
    capped, free = SMALL.select(ctx, 4 * q, k, v), SMALL.select(plain, 4 * q, k, v)
    assert capped.density() != free.density()


def test_plan_gives_each_head_its_threshold() -> None:
    q, k, v = random_qkv(300, 300)
    taus = [0.0, 0.1, 0.3, 0.9, 2.7, 1e9]
    found = selected(SMALL, q, k, v, plan=plan_of(taus)).dense_mask()
    for head, tau in enumerate(taus):
        assert torch.equal(found[:, head], selected(replace(SMALL, tau=tau), q, k, v).dense_mask()[:, head])
    with pytest.raises(ValueError, match="this sale plan is for 2 heads, layer 0 has 6"):
        selected(SMALL, q, k, v, plan=plan_of([0.1, 0.2]))


def test_no_value_from_the_future() -> None:
    q, k, v = random_qkv(300, 300)
    other = v.clone()
    other[:, :, 120:] = 7.0
    a, b = (SMALL.attend(context(q, k, x), q, k, x) for x in (v, other))
    assert torch.equal(a[:, :, :120], b[:, :, :120])
    assert not torch.equal(a[:, :, 120:], b[:, :, 120:])


def test_layers_of_a_pass_share_the_near_keys_of_their_shape() -> None:
    """Only the lists are shared: another length in the same pass gets its own."""
    ctx: LayerContext | None = None
    ran: list[Selection | None] = []
    for n_q, n_k in ((300, 300), (300, 300), (77, 300)):
        q, k, v = random_qkv(n_q, n_k)
        fresh = context(q, k, v, ran=ran)
        ctx = fresh if ctx is None else replace(fresh, shared=ctx.shared)
        assert torch.equal(SMALL.attend(ctx, q, k, v), SMALL.attend(context(q, k, v), q, k, v))
    assert ran[0] is ran[2] and ran[2] is not ran[4]


@pytest.mark.gpu
def test_choosing_waits_for_no_device() -> None:
    q, k, v = (torch.randn(1, h, 2048, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    ctx, method = context(q, k, v), SALE(tau=0.1)
    near = method._near(ctx, q, k, v)

    def chosen() -> Selection:
        return method._choose(method._estimate(ctx, q, k, near), method._taus(ctx, q), q, k)

    want = chosen()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = chosen()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.starts, want.starts) and int(want.start_counts.sum()) > 0


def test_short_prompts_and_decoding_are_dense() -> None:
    for n_q, n_k in ((1, 300), (64, 64)):
        q, k, v = random_qkv(n_q, n_k)
        ran: list[Selection | None] = []
        replace(SMALL, dense_below=64).attend(context(q, k, v, ran=ran), q, k, v)
        assert ran == [None]


@pytest.mark.parametrize(("field", "value"), [
    ("tau", -1), ("tau", math.inf), ("tau", True), ("local", 0), ("segment", 100), ("sinks", 20), ("block_q", 0), ("block_k", 1.5),
    ("bits", 3), ("group", 0), ("dense_below", -1), ("theta", "a"),
])  # fmt: skip
def test_wrong_fields_are_refused_in_one_sentence(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^sale\({field}=") as caught:
        SALE(**{field: value})
    assert "\n" not in str(caught.value)


def test_spec_round_trip() -> None:
    assert build("sale(tau=0.01, group=8)").spec == "sale(tau=0.01, group=8)" and build("sale") == SALE()


# -- the offline fit -----------------------------------------------------------------------------------------------------


def test_calibration_halves_until_the_error_fits() -> None:
    """The threshold of a head is the first of 0.008, 0.004, ... whose error is below theta a token; 0 where none is."""
    assert CANDIDATES[:2] == [0.008, 0.004] and CANDIDATES[-1] > 1e-4 >= CANDIDATES[-1] / 2
    q, k, v = random_qkv(400, 400)
    q = q * torch.tensor([1.0, 3.0, 6.0, 0.1, 4.0, 2.0]).view(1, 6, 1, 1) * 2
    probe = SMALL.measure(context(q, k, v), q, k, v)
    assert probe["errors"][:, 0].sum() > 1.5 * probe["errors"][:, -1].sum()
    tokens = float(probe["tokens"])
    assert tokens == 800
    middle = float(probe["errors"].median()) / tokens
    method = replace(SMALL, theta=middle)
    taus = method.conclude(probe)["tau"]
    dense = attend(q, k, v).out
    seen = set()
    for head, tau in enumerate(taus.tolist()):
        seen.add(tau)
        for tried in [c for c in CANDIDATES if c > tau][-1:] + ([tau] if tau else []):
            out = replace(SMALL, tau=tried).attend(context(q, k, v), q, k, v)
            error = float((out - dense)[:, head].abs().sum(dtype=torch.float64)) / tokens
            assert (error < middle) == (tried == tau), (head, tried)
    assert len(seen) > 2
    assert replace(SMALL, theta=0.0).conclude(probe)["tau"].tolist() == [0.0] * 6


def test_statistics_add_up_over_samples() -> None:
    q, k, v = random_qkv(200, 200)
    # the second row alone has its own means, as it has in the batch
    whole = SMALL.measure(context(q, k, v), q, k, v)
    rows = [(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(2)]
    parts = [SMALL.measure(context(a, b, c), a, b, c) for a, b, c in rows]
    for name, value in whole.items():
        assert torch.allclose(value, parts[0][name] + parts[1][name], rtol=1e-4), name


# -- the pocket model ----------------------------------------------------------------------------------------------------


def test_needles_are_found() -> None:
    ids, answers = prompts(1087, (0.3, 0.7))
    found, density = hits(ids, answers, "sale(tau=0.1)")
    assert found == 2 and density < 0.6
    # sinks and local keys alone lose them
    lost, less = hits(ids, answers, "sale(tau=1e9)")
    assert lost < 2 and less < density


@pytest.mark.slow
def test_calibrated_thresholds_keep_the_output() -> None:
    method = "sale(theta=0.1)"  # the pocket model's outputs are small: at 0.4 every head may keep the largest threshold
    plan = saccade.calibrate(pocket(), method, [streams(1, 1535)])
    taus = torch.stack([plan.tensor(layer, "tau") for layer in range(8)])
    assert len(taus.unique()) > 2
    ids, answers = prompts(2047, (0.3, 0.7))
    found, density = hits(ids, answers, method, plan)
    assert found == 2 and density < 0.9
