"""top-theta: its thresholds, its repairs, single tokens and prompts, and what it finds."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from tests.methods.decode.harness import answer, context, ids_of, logits, needle, pocket, tensors
from torch import Tensor

import saccade
from saccade.core import LayerContext, Plan
from saccade.evaluate.text import shipped_text
from saccade.methods.decode.top_theta import TopTheta
from saccade.parts.compensated import above, kept_before, last_of, nearest_entry

BARE = {"sdc": None, "vmc": False}


def rows(seed: int, n: int = 300, sharp: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """q with n rows, k, v of 6 query and 2 key heads; values have a mean and follow their keys a little."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, n, 16, generator=g, dtype=torch.float64) for h in (6, 2, 2))
    return sharp * q, k, v + 0.5 * k + 1


def plan_of(method: TopTheta, *samples: tuple[Tensor, Tensor, Tensor]) -> Plan:
    """The plan for layer 2."""
    sums: dict[str, Tensor] = {}
    for q, k, v in samples:
        sums = method.combine(sums, method.measure(context(q[:, :, :1], k, v), q, k, v))
    return plan_with(method.conclude(sums))


def plan_with(found: dict[str, Tensor]) -> Plan:
    return Plan(slug="top-theta", spec="top-theta", fingerprint="", tensors={f"layer.2.{name}": x for name, x in found.items()}, notes={})


def fixed(theta: Tensor, n: int, residual: float = 0.0) -> Plan:
    """A plan with one threshold a head."""
    return plan_with({"lengths": torch.tensor([n]), "theta": theta.view(-1, 1), "residual": torch.full((theta.numel(), 1), residual)})


def run(method: TopTheta, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    return saccade.attention(q, k, v, method, plan=plan, layer=2, layers=8)


def survivors(method: TopTheta, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """How many keys each row keeps, `(B, Hq, N)`."""
    return method.select(context(q, k, v, plan), q, k, v).dense_mask().sum(-1)


# -- thresholds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", ["pre", "post"])
def test_the_threshold_of_one_sample_is_its_kth_highest_score(scores: Any) -> None:
    q, k, v = rows(0, n=100)
    plan = plan_of(TopTheta(k=20, c=0.0, scores=scores), (q, k, v))
    assert plan.tensor(2, "lengths").tolist() == [30, 40, 50, 60, 70, 80, 90, 100]
    for i, n in enumerate(range(30, 101, 10)):
        a = logits(q[:, :, n - 1 : n], k[:, :, :n]) * 0.25
        a = a if scores == "pre" else a.softmax(-1)
        kth = a.sort(-1, descending=True).values[0, :, 19]
        assert float((plan.tensor(2, "theta")[:, i] - kth).abs().max()) < 1e-6
    dropped = (a := logits(q[:, :, -1:], k) * 0.25).sort(-1).values[0, :, :-20]
    assert float((plan.tensor(2, "residual")[:, -1] - (dropped - a.amax(-1)[0].unsqueeze(-1)).exp().sum(-1)).abs().max()) < 1e-5


def test_thresholds_are_mean_plus_c_deviations_over_samples_of_any_length() -> None:
    samples = [rows(s, n=n) for s, n in ((0, 60), (1, 100), (2, 80))]
    alone = [plan_of(TopTheta(k=20, c=0.0), sample).tensor(2, "theta") for sample in samples]
    both = torch.stack([theta[:, 3] for theta in alone])  # row length 60
    want = both.mean(0) + 0.7 * both.var(0, unbiased=False).sqrt()
    plan = plan_of(TopTheta(k=20, c=0.7), *samples)
    assert float((plan.tensor(2, "theta")[:, 3] - want).abs().max()) < 1e-5
    assert float((plan.tensor(2, "theta")[:, -1] - alone[1][:, -1]).abs().max()) < 1e-6  # only one sample is that long
    batch = [torch.cat([x, y]) for x, y in zip(rows(0, n=60), rows(5, n=60), strict=True)]
    one, two = plan_of(TopTheta(k=20), (batch[0], batch[1], batch[2])), plan_of(TopTheta(k=20), rows(0, n=60), rows(5, n=60))
    assert float((one.tensor(2, "theta") - two.tensor(2, "theta")).abs().max()) < 1e-6


def test_the_nearest_calibrated_length_counts() -> None:
    known = torch.tensor([20, 40, 50])
    assert nearest_entry(known, torch.tensor([1, 20, 29, 30, 31, 45, 46, 900])).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert nearest_entry(known[:1], torch.tensor([1, 99])).tolist() == [0, 0]


def test_about_k_survive_on_other_data() -> None:
    method = TopTheta(k=24, c=0.0, every=20)
    plan = plan_of(method, *(rows(s) for s in range(8)))
    found = torch.cat([survivors(method, *rows(s), plan)[..., 39::20] for s in (20, 21)]).double()  # rows of calibrated lengths
    assert abs(float(found.mean()) - 24) < 0.15 * 24
    stricter = TopTheta(k=24, c=1.0, every=20)
    higher = survivors(stricter, *rows(20), plan_of(stricter, *(rows(s) for s in range(8))))
    assert float(higher[..., 39::20].double().mean()) < 0.8 * 24, "c raises the threshold"


def test_short_rows_are_dense_and_the_cap_keeps_the_last() -> None:
    q, k, v = rows(0, n=100)
    plan = fixed(torch.full((6,), -1e9), 50)
    counts = survivors(TopTheta(k=30), q, k, v, plan)
    assert torch.equal(counts, torch.arange(1, 101).expand(1, 6, -1))
    capped = TopTheta(k=30, cap=True).select(context(q, k, v, plan), q, k, v).dense_mask()
    reach = torch.arange(100) > (torch.arange(100) - 30).unsqueeze(-1)
    assert torch.equal(capped[0, 0], reach.tril())
    none = survivors(TopTheta(k=30), q, k, v, fixed(torch.full((6,), 1e9), 50))
    assert none[0, 0].tolist() == [*range(1, 31), *[0] * 70]
    assert last_of(torch.tensor([True, True, False, True]), 2).tolist() == [False, True, False, True]


# -- repairs ---------------------------------------------------------------------------------------------------------------


def test_exact_denominators_give_full_softmax_weights_as_thresholds_after_softmax_do() -> None:
    q, k, v = rows(1)
    a = logits(q[:, :, -1:], k).unsqueeze(2) * 0.25
    theta = a.topk(25, dim=-1).values[..., -2:].mean(-1, keepdim=True)
    never = torch.zeros(1, dtype=torch.bool)
    mask = above(a, theta, never)
    kept = kept_before(a, mask, "exact", theta)
    full = a.softmax(-1)
    assert float((kept.weights - full * mask).abs().max()) < 1e-15 and int(mask.sum()) == 6 * 24
    theta = theta[0, :, 0]
    after = (theta - a.logsumexp(-1)[0]).exp()
    for vmc in (False, True):
        pre = run(TopTheta(k=24, vmc=vmc, sdc="exact"), q[:, :, -1:], k, v, fixed(theta, 300))
        post = run(TopTheta(k=24, vmc=vmc, scores="post"), q[:, :, -1:], k, v, fixed(after, 300))
        assert float((pre - post).abs().max()) < 1e-6


def test_repairs_by_hand() -> None:
    a, theta = torch.tensor([0.0, 1.0, 2.0, -1.0]).double(), torch.tensor([0.5]).double()
    e = (a - 2).exp()
    mask = above(a, theta, torch.tensor([False]))
    given = torch.tensor([0.3], dtype=torch.float64)
    for dropped, lost in ((None, 0.0), ("exact", float(e[0] + e[3])), ("exp", 2 * math.exp(-1.5)), (given, 0.3)):
        weights = kept_before(a, mask, dropped, theta, 0.5).weights
        assert float((weights - e * mask / (e[1] + e[2] + 0.5 * lost)).abs().max()) < 1e-12
    whole = kept_before(a, torch.ones(4, dtype=torch.bool), torch.tensor([0.3]).double(), theta)
    assert float((whole.weights - a.softmax(-1)).abs().max()) < 1e-12, "where nothing is dropped nothing is repaired"
    nothing = kept_before(a, torch.zeros(4, dtype=torch.bool), None, theta)
    assert bool((nothing.weights == 0).all())


@pytest.mark.parametrize("sdc", ["exact", "offline"])
def test_repairs_lower_the_error_at_equal_k(sdc: Any) -> None:
    samples = [rows(s) for s in range(4)]
    q, k, v = rows(30)
    dense = saccade.attention(q, k, v)
    errors = {}
    for name, options in {"plain": BARE, "sdc": {"sdc": sdc, "vmc": False}, "both": {"sdc": sdc}, "vmc": {"sdc": None}}.items():
        method = TopTheta(k=24, c=0.0, every=20, **options)
        gap = run(method, q, k, v, plan_of(method, *samples)) - dense
        errors[name] = float(gap[:, :, 100:].norm(dim=-1).mean())
    assert errors["both"] < 0.6 * errors["plain"]
    # weights that add up to 1 leave nothing for the values' mean, but where a row keeps nothing
    assert abs(errors["vmc"] - errors["plain"]) < 0.02 * errors["plain"]


def test_a_row_that_keeps_nothing_is_the_mean_of_its_values() -> None:
    q, k, v = rows(2, n=80)
    got = run(TopTheta(k=20), q, k, v, fixed(torch.full((6,), 1e9), 50))
    mean = (v.cumsum(2) / torch.arange(1, 81).unsqueeze(-1)).repeat_interleave(3, 1)
    assert float((got - mean)[:, :, 20:].abs().max()) < 1e-12, "causal: of its own row and before"
    assert float((got - saccade.attention(q, k, v))[:, :, :20].abs().max()) < 1e-12
    assert bool((run(TopTheta(k=20, **BARE), q, k, v, fixed(torch.full((6,), 1e9), 50))[:, :, 20:] == 0).all())


# -- prompts and single tokens ---------------------------------------------------------------------------------------------

VARIANTS = [
    TopTheta(k=24), TopTheta(k=24, sdc="exp", sdc_scale=0.2), TopTheta(k=24, sdc="offline", cap=True), TopTheta(k=24, scores="post"),
    TopTheta(k=24, **BARE),
]  # fmt: skip


@pytest.mark.parametrize("method", VARIANTS, ids=lambda m: m.spec)
def test_a_prompt_gives_what_its_tokens_give_alone(method: TopTheta) -> None:
    q, k, v = rows(3, n=200)
    plan = plan_of(method, rows(0), rows(1))
    whole = run(method, q, k, v, plan)
    later = run(method, q[:, :, 70:], k, v, plan)
    assert float((whole[:, :, 70:] - later).abs().max()) < 1e-12
    for n in (10, 24, 25, 64, 129, 200):
        one = run(method, q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], plan)
        assert float((whole[:, :, n - 1 : n] - one).abs().max()) < 1e-12


def test_the_mean_value_is_kept_up_to_date_and_taken_back() -> None:
    q, k, v = tensors(2, 6, 2, 300, 16)
    method, ctx = TopTheta(), context(q, k, v)
    for n in (10, 63, 64, 150, 299, 300):
        assert float((method._value_mean(ctx, v[:, :, :n]) - v[:, :, :n].mean(2)).abs().max()) < 1e-12
    assert method.rewind(ctx, 130) == 130 and ctx.state["value_sums"].n == 2
    other = torch.cat([v[:, :, :130], 3 * v[:, :, 130:]], dim=2)
    assert float((method._value_mean(ctx, other) - other.mean(2)).abs().max()) < 1e-12
    assert float((method._value_mean(ctx, other[:, :, :140]) - other[:, :, :140].mean(2)).abs().max()) < 1e-12


def test_value_rows_are_loaded_for_a_group_together_and_half_a_pair_each() -> None:
    q, k, v = rows(4)
    method, counted = TopTheta(k=24), []
    plan = plan_of(method, rows(0))
    ctx = context(q[:, :, -1:], k, v, plan)
    ctx.phase, ctx.count = "decode", counted.append
    method.attend(ctx, q[:, :, -1:], k, v)
    mask = ctx.published(2).dense_mask().squeeze(2)
    assert torch.equal(mask, method.select(ctx, q[:, :, -1:], k, v).dense_mask().squeeze(2))
    union = mask.unflatten(1, (2, 3)).any(2).sum(-1).double().mean()
    assert counted == [pytest.approx(0.5 * (300 + float(union)))] and float(union) > 1.5 * float(mask.sum(-1).double().mean())


@pytest.mark.parametrize("k", [200, 1 << 30])
def test_k_for_all_equals_dense(k: int) -> None:
    q, keys, v = rows(5, n=200)
    method = TopTheta(k=k)
    got = run(method, q, keys, v, plan_of(method, rows(0, n=150)))
    assert float((got - saccade.attention(q, keys, v)).abs().max()) < 1e-14


def test_first_layers_keep_more() -> None:
    assert [TopTheta().kept_in(layer) for layer in range(4)] == [512, 512, 64, 64]


def test_a_plan_of_short_samples_is_refused() -> None:
    q, k, v = rows(0, n=100)
    with pytest.raises(ValueError, match="saw no sequence longer than k=64"):
        run(TopTheta(), q, k, v, plan_of(TopTheta(), rows(1, n=60)))


# -- the pocket model ------------------------------------------------------------------------------------------------------

METHOD = TopTheta(k=64, first_k=256, every=200)


@cache
def pocket_plan() -> Plan:
    """Calibrated on 2K tokens of the shipped text."""
    text = shipped_text()
    return saccade.calibrate(pocket(), METHOD, [ids_of(text[:2047])])


def test_the_pocket_model_finds_a_needle_with_a_fraction_of_the_value_rows() -> None:
    prompt = needle()
    text, stats = answer(prompt, METHOD, pocket_plan())
    assert text == prompt.answer
    shares = [2 * layer["decode_density"] - 1 for layer in stats.per_layer]
    assert sum(shares) / 8 < 0.25 and max(shares[2:]) < 0.25


def test_shifted_weights_lose_the_needle(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = TopTheta._keep

    def shifted(self: TopTheta, ctx: LayerContext, a: Tensor, lengths: Tensor) -> Any:
        return keep(self, ctx, a.roll(391, dims=-1), lengths)

    monkeypatch.setattr(TopTheta, "_keep", shifted)
    assert answer(needle(), METHOD, pocket_plan())[0] != needle().answer


def test_a_prompt_of_the_pocket_model_runs_thresholded() -> None:
    ids = needle().ids[:, :500]
    with torch.no_grad():
        dense = pocket()(ids).logits
        with saccade.attach(pocket(), prefill=METHOD, decode=METHOD, plan=pocket_plan()) as handle:
            got = pocket()(ids).logits
            stats = handle.stats()
    assert stats.prefill_density is not None and 0.5 < stats.prefill_density < 0.8
    agree = (got.argmax(-1) == dense.argmax(-1)).double().mean()
    assert float(agree) > 0.9 and float((got - dense).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"first_layers": -1}, "first_layers=-1"),
        ({"every": True}, "every=True"),
        ({"c": float("nan")}, "c=nan"),
        ({"sdc_scale": -1.0}, "sdc_scale=-1.0. is not a finite number from 0 on"),
        ({"scores": "mid"}, "scores='mid'"),
        ({"sdc": "guess"}, "sdc='guess'"),
        ({"vmc": 1}, "vmc=1"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopTheta(**fields)
