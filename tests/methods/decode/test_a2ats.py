"""a2ats: its metric, its codes, what position does to its scores, and what it finds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random

import pytest
import torch
from tests.methods.decode.harness import answer, best, context, ids_of, logits, needle, pocket, recall, tensors
from torch import Tensor

import saccade
from saccade.attach.rotary import rotary_of
from saccade.core import LayerContext, Plan, Rotary, Selection
from saccade.evaluate.text import grammar
from saccade.methods.decode.a2ats import A2ATS
from saccade.ops import decode
from saccade.parts.clusters import kmeans, nearest
from saccade.parts.rotary import turn
from saccade.train.text import NOUNS, insert_at_lines, needle_sentence

ROTARY = Rotary(1e4 ** -(torch.arange(8) / 8))  # 16 channels
Sample = tuple[Tensor, Tensor, Tensor]


def turned(seed: int = 0, n: int = 600, strong: float = 1.0) -> Sample:
    """q with n rows, k, v of 4 query and 2 key heads, turned to their positions. Four channels of the queries are `strong` times larger."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, n, 16, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    # both channels of two slow pairs: turning mixes a pair's channels only
    q[..., [6, 7, 14, 15]] *= strong
    places = torch.arange(n)
    return turn(q, places, ROTARY), turn(k, places, ROTARY), v


def at(ctx: LayerContext) -> LayerContext:
    return replace(ctx, rotary=ROTARY)


def plan_of(method: A2ATS, *samples: Sample) -> Plan:
    """The plan for layer 2."""
    sums: dict[str, Tensor] = {}
    for q, k, v in samples:
        sums = method.combine(sums, method.measure(at(context(q[:, :, :1], k, v)), q, k, v))
    return plan_with(method.conclude(sums))


def plan_with(found: dict[str, Tensor]) -> Plan:
    return Plan(slug="a2ats", spec="a2ats", fingerprint="", tensors={f"layer.2.{name}": x for name, x in found.items()}, notes={})


def observed(method: A2ATS, q: Tensor, k: Tensor, plan: Plan) -> LayerContext:
    ctx = at(context(q, k, k, plan))
    method.observe(ctx, k, k, 0)
    return ctx


def read(method: A2ATS, q: Tensor, k: Tensor, plan: Plan) -> Selection:
    return method.select(observed(method, q, k, plan), q, k, k)


def far_logits(q: Tensor, k: Tensor, distance: int) -> Tensor:
    """`(B, Hq, n)`: logits of a query, the last position, with all keys at one distance; without the scale."""
    n = k.shape[2]
    return logits(turn(q, distance - (n - 1), ROTARY), turn(k, -torch.arange(n), ROTARY))


# -- the metric ------------------------------------------------------------------------------------------------------------


def test_distances_after_the_factor_are_the_queries_quadratic_form() -> None:
    q, k, v = turned(strong=6)
    method = A2ATS(distance=100, centroids=20, eps=1e-9)
    plan = plan_of(method, (q, k, v))
    far = turn(q, 100 - torch.arange(600), ROTARY).unflatten(1, (2, 2)).transpose(0, 1).flatten(1, 3)
    moment = far.mT @ far
    h = moment / moment.square().mean((-1, -2), keepdim=True).sqrt()
    factor = plan.tensor(2, "factor").double()
    assert float((factor @ factor.mT - h).abs().max()) < 1e-5
    gap = (turn(k, -torch.arange(600), ROTARY)[0] - plan.tensor(2, "lookup").double()[:, :1])
    form = (gap.unsqueeze(-2) @ h.unsqueeze(1) @ gap.unsqueeze(-1)).flatten(1)
    assert float(((gap @ factor).square().sum(-1) / form - 1).abs().max()) < 1e-3
    # and that form is the mean square of the queries' score errors
    errors = (far @ gap.mT).square().mean(1)
    size = h.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) / far.square().sum(-1).mean(1, keepdim=True)
    assert float((errors / form * size - 1).abs().max()) < 1e-3


def test_lookup_is_the_codebook_in_the_keys_own_space() -> None:
    plan = plan_of(A2ATS(centroids=50), turned(strong=6))
    back = plan.tensor(2, "lookup").double() @ plan.tensor(2, "factor").double()
    assert float((back - plan.tensor(2, "codebook")).abs().max()) < 1e-4
    assert plan.tensor(2, "codebook").shape == (2, 50, 16)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_codebook_serves_the_queries_better_than_plain_clusters(seed: int) -> None:
    """Mean square score error over other queries and keys, equal numbers of centroids."""
    method = A2ATS(distance=100, centroids=32)
    sample = turned(strong=6, n=2000)
    aware = plan_of(method, sample)
    plain_keys = turn(sample[1], -torch.arange(2000), ROTARY)[0].float()
    centroids = kmeans(plain_keys, 32, generator=torch.Generator().manual_seed(0)).centroids
    plain = plan_with({"factor": torch.eye(16).expand(2, 16, 16), "codebook": centroids, "lookup": centroids})
    q, k, _ = turned(seed, strong=6)
    errors = []
    for plan in (aware, plain):
        total = 0.0
        for row in range(500, 600):
            one = turn(q[:, :, row : row + 1], 599 - row, ROTARY)  # as the last position
            ctx = observed(method, one, k, plan)
            total += float((method.estimate(ctx, one) / ctx.scale - far_logits(one, k, 100)).square().mean())
        errors.append(total / 100)
    assert errors[0] < 0.7 * errors[1]


# -- choosing --------------------------------------------------------------------------------------------------------------


def test_one_code_per_key_chooses_by_exact_far_logits() -> None:
    q, k, v = turned(n=300)
    method = A2ATS(budget=30, window=16, sinks=4, distance=64, centroids=300)
    one = q[:, :, -1:]
    got = read(method, one, k, plan_of(method, (q, k, v)))
    scores = far_logits(one, k, 64)
    scores[..., :4] = scores[..., -16:] = -torch.inf
    want = best(scores, 30).unflatten(1, (2, 2)).any(2)
    want[..., :4] = want[..., -16:] = True
    assert got.heads == 2 and torch.equal(got.dense_mask().squeeze(2), want)
    assert bool((got.token_counts > 50).any()), "two query heads that want the same keys show no union"


def test_far_scores_do_not_know_where_keys_and_query_stand() -> None:
    g = torch.Generator().manual_seed(4)
    content, q = torch.randn(1, 2, 200, 16, generator=g, dtype=torch.float64), torch.randn(1, 4, 1, 16, generator=g, dtype=torch.float64)
    method = A2ATS(distance=64, centroids=40)
    plan = plan_of(method, turned())
    scores = []
    for shift in (0, 70):
        filler = turned(seed=shift, n=shift)[1] if shift else content[:, :, :0]
        k = torch.cat([filler, turn(content, shift + torch.arange(200), ROTARY)], dim=2)
        one = turn(q, 199 + shift, ROTARY)
        scores.append(method.estimate(observed(method, one, k, plan), one)[..., shift:])
    assert float((scores[0] - scores[1]).abs().max()) < 1e-9


@pytest.mark.parametrize("n", [1, 9, 60, 300])
def test_a_budget_for_all_equals_dense(n: int) -> None:
    q, k, v = turned(n=n)
    method = A2ATS(budget=1.0, window=8, sinks=2, centroids=16)
    one = q[:, :, -1:]
    s = read(method, one, k, plan_of(method, turned()))
    assert s.density() == 1
    assert float((decode(one, k, v, s).out - saccade.attention(one, k, v)).abs().max()) < 1e-14


# -- the pocket model ------------------------------------------------------------------------------------------------------


@cache
def pocket_plan() -> Plan:
    """Calibrated on 3K tokens of the shipped text with random strings in it, as in the paper: seven digits in sentences."""
    text, batches = grammar(), []
    for seed in (0, 1):
        rng = Random(seed)
        facts = [needle_sentence(rng.choice(NOUNS), text.key(rng), str(rng.randrange(10**6, 10**7))).encode() for _ in range(8)]
        batches.append(ids_of(insert_at_lines(text.haystack(rng, 1100), [(rng.random(), fact) for fact in facts])))
    return saccade.calibrate(pocket(), A2ATS(centroids=256, iterations=4), batches)


@pytest.mark.slow
def test_the_pocket_model_finds_a_needle() -> None:
    prompt = needle()
    text, stats = answer(prompt, A2ATS(budget=0.1), pocket_plan())
    assert text == prompt.answer
    assert stats.decode_density is not None and 0.1 < stats.decode_density < 0.26


@pytest.mark.slow
def test_codes_rank_the_pocket_models_tokens_far_above_chance() -> None:
    """Recall of the exact best sixteenth among far keys, in the layers that retrieve and their neighbours."""
    found = torch.zeros(2)
    method = A2ATS()
    for index in range(3, 7):
        layer, plan = needle().layers[index], pocket_plan()
        own = plan_with({name: plan.tensor(index, name) for name in ("factor", "codebook", "lookup")})
        q, k = layer.q[:, :, -1:], layer.k
        ctx = replace(context(q, k, k, own), rotary=rotary_of(pocket(), index))
        method.observe(ctx, k, k, 0)
        estimated = method.estimate(ctx, q)[..., 8:-64]
        true = best(logits(q, k)[..., 8:-64], 128)
        found += torch.tensor([recall(best(estimated, 128), true), 128 / true.shape[-1]]) / 4
    assert float(found[0]) > 3 * float(found[1])


def test_shuffled_codes_lose_the_needle(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = A2ATS.estimate

    def shuffled(self: A2ATS, ctx: LayerContext, q: Tensor) -> Tensor:
        scores = estimate(self, ctx, q)
        return scores[..., torch.randperm(scores.shape[-1], generator=torch.Generator().manual_seed(ctx.layer))]

    monkeypatch.setattr(A2ATS, "estimate", shuffled)
    text, _ = answer(needle(), A2ATS(budget=0.1), pocket_plan())
    assert text != needle().answer


# -- the index -------------------------------------------------------------------------------------------------------------


def test_codes_are_two_bytes_a_key_and_the_nearest_centroids() -> None:
    q, k, v = turned()
    method = A2ATS(centroids=30)
    plan = plan_of(method, (q, k, v))
    codes = observed(method, q[:, :, -1:], k, plan).state["codes"].view
    assert codes.dtype == torch.int16 and codes.shape == (1, 2, 600)
    keys = (turn(k, -torch.arange(600), ROTARY) @ plan.tensor(2, "factor").double())[0]
    away = torch.cdist(keys, plan.tensor(2, "codebook").double())
    assert torch.equal(codes[0].long(), away.argmin(-1))
    assert torch.equal(codes[0].long(), nearest(keys, plan.tensor(2, "codebook").double()))


def test_taking_tokens_back_and_going_on_is_as_if_they_had_come_so() -> None:
    q, k, v = turned(n=90)
    method = A2ATS(budget=10, window=8, sinks=2, centroids=16)
    plan, one = plan_of(method, (q, k, v)), q[:, :, -1:]
    ctx = at(context(one, k, k, plan))
    assert method.rewind(ctx, 40) == 0
    method.observe(ctx, k[:, :, :70], k, 0)
    assert method.rewind(ctx, 61) == 61
    again = torch.cat([k[:, :, :61], turned(seed=5, n=90)[1][:, :, 61:]], 2)
    for i in range(61, 90):
        method.observe(ctx, again[:, :, i : i + 1], k, i)
    assert torch.equal(ctx.state["codes"].view, observed(method, one, again, plan).state["codes"].view)


def test_calibration_keys_are_capped_and_parts_add_up() -> None:
    whole, method = turned(n=400), A2ATS(centroids=8, samples=300)
    sums: dict[str, Tensor] = {}
    for seed in (0, 1):
        q, k, v = turned(seed, n=200)
        sums = method.combine(sums, method.measure(at(context(q[:, :, :1], k, v)), q, k, v))
    assert sums["keys"].shape == (2, 300, 16)
    assert method.measure(at(context(whole[0][:, :, :1], whole[1], whole[2])), *whole)["keys"].shape == (2, 300, 16)


def test_without_rotary_embedding_it_refuses() -> None:
    q, k, v = tensors(1, 4, 2, 50, 16)
    with pytest.raises(ValueError, match="no rotary embedding"):
        saccade.attention(q, k, v, A2ATS(), plan=plan_of(A2ATS(centroids=8), turned()), layer=2, layers=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"sinks": -1}, "sinks=-1"),
        ({"distance": 1.5}, "distance=1.5"),
        ({"centroids": 40000}, "does not fit a 16-bit code"),
        ({"eps": 0}, "eps=0"),
        ({"samples": True}, "samples=True"),
        ({"budget": saccade.core.Mass(0.9)}, "chooses a fixed number of tokens"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        A2ATS(**fields)
