"""double-sparsity: its channels, its labels, what they find, and what they cost."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests.methods.decode.harness import answer, best, choose, context, ids_of, logits, needle, pocket, recall, tensors
from torch import Tensor

import saccade
from saccade.core import Plan
from saccade.evaluate.text import shipped_text
from saccade.methods.decode import double_sparsity as module
from saccade.methods.decode.double_sparsity import DoubleSparsity
from saccade.methods.decode.quest import Quest
from saccade.ops.estimate import Reduce
from saccade.parts.heads import reduce_heads

EXACT = {"bits": None, "sinks": 0, "recent": 0}
OUTLIERS = [3, 17, 40, 58]  # channels that are large in keys and queries of key head 0; 1 and 2 places further in heads 1 and 2


def planted(seed: int = 0, n: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of 6 query and 3 key heads, dim 64, with four strong channels a key head; q has n rows too."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, n, 64, generator=g, dtype=torch.float64) for h in (6, 3, 3))
    for head in range(3):
        where = [c + head for c in OUTLIERS]
        k[:, head, :, where] *= 8
        q[:, 2 * head : 2 * head + 2, :, where] *= 4
    return q, k, v


def plan_of(method: DoubleSparsity, *samples: tuple[Tensor, Tensor, Tensor]) -> Plan:
    """The plan for layer 2."""
    sums: dict[str, Tensor] = {}
    for q, k, v in samples:
        sums = method.combine(sums, method.measure(context(q[:, :, :1], k, v), q, k, v))
    found = {f"layer.2.{name}": value for name, value in method.conclude(sums).items()}
    return Plan(slug="double-sparsity", spec=method.spec, fingerprint="", tensors=found, notes={})


def with_channels(channels: Tensor) -> Plan:
    found = {"layer.2.channels": channels}
    return Plan(slug="double-sparsity", spec="double-sparsity", fingerprint="", tensors=found, notes={})


def read(method: DoubleSparsity, q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    """`(B, Hq, n)` bool."""
    return choose(method, q, k, k, plan).dense_mask().squeeze(2)


# -- exactness -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1.0, 16, 99])
def test_all_channels_unquantised_choose_the_exact_top_k(channels: float | int) -> None:
    q, k, v = tensors(2, 6, 2, 203, 16)
    plan = plan_of(DoubleSparsity(), (q.expand(-1, -1, 203, -1), k, v))
    got = read(DoubleSparsity(channels=channels, budget=0.2, **EXACT), q, k, plan)
    assert torch.equal(got, best(logits(q, k), 41))  # 0.2 of 203, rounded up


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("n", [1, 15, 203])
def test_a_budget_for_all_equals_dense(n: int, bits: int | None) -> None:
    q, k, v = tensors(2, 6, 2, n, 16)
    plan = plan_of(DoubleSparsity(), (q.expand(-1, -1, n, -1), k, v))
    for budget in (1.0, n, n + 7):
        got = saccade.attention(q, k, v, DoubleSparsity(budget=budget, bits=bits), plan=plan, layer=2, layers=8)
        assert float((got - saccade.attention(q, k, v)).abs().max()) < 1e-14


def test_ranking_is_by_the_chosen_channels_alone() -> None:
    q, k, v = planted()
    plan = plan_of(DoubleSparsity(), (q, k, v))
    channels = plan.tensor(2, "channels")[:, :5]
    scores = torch.stack([
        (q[:, h, -1:][..., channels[h // 2]] @ k[:, h // 2][..., channels[h // 2]].mT).squeeze(1) for h in range(6)
    ], dim=1)  # fmt: skip
    assert torch.equal(read(DoubleSparsity(channels=5, budget=100, **EXACT), q[:, :, -1:], k, plan), best(scores, 100))


def test_first_and_newest_tokens_come_out_of_the_budget() -> None:
    q, k, v = tensors(1, 6, 2, 500, 16)
    plan = plan_of(DoubleSparsity(), (q.expand(-1, -1, 500, -1), k, v))
    mask = read(DoubleSparsity(budget=50, sinks=4, recent=16), q, k, plan)
    assert bool(mask[..., :4].all()) and bool(mask[..., -16:].all()) and bool((mask.sum(-1) == 50).all())
    tight = read(DoubleSparsity(budget=6, sinks=4, recent=16), q, k, plan)
    assert bool((tight.nonzero()[:, 2].view(6, 6) == torch.tensor([0, 1, 2, 3, 498, 499])).all())


# -- heads of a group ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["none", "group_max", "group_sum"])
@pytest.mark.parametrize("bits", [None, 3, 4])
def test_heads_of_a_group_choose_together(reduce: Reduce, bits: int | None) -> None:
    q, k, _ = planted(n=300)
    plan = plan_of(DoubleSparsity(), (q, k, k))
    q = q[:, :, -1:]
    ends = {"channels": 0.25, "bits": bits, "sinks": 2, "recent": 3}
    ctx = context(q, k, k, plan)
    single = DoubleSparsity(**ends)
    single.observe(ctx, k, k, 0)
    scores = reduce_heads(single.label_logits(ctx, q.squeeze(2)), 3, reduce)
    scores[..., :2] = scores[..., -3:] = torch.inf
    found = choose(DoubleSparsity(budget=30, reduce=reduce, **ends), q, k, k, plan)
    assert found.heads == (6 if reduce == "none" else 3)
    assert torch.equal(found.dense_mask().squeeze(2), best(scores, 30))


@pytest.mark.parametrize("reduce", ["group_max", "group_sum"])
def test_all_channels_find_what_quest_finds_with_pages_of_one_token(reduce: Reduce) -> None:
    q, k, v = tensors(2, 6, 2, 203, 16)
    plan = plan_of(DoubleSparsity(), (q.expand(-1, -1, 203, -1), k, v))
    method = DoubleSparsity(channels=1.0, budget=41, bits=None, sinks=0, recent=1, reduce=reduce)
    quest = Quest(page_size=1, budget=41, reduce=reduce)
    assert torch.equal(choose(method, q, k, v, plan).dense_mask(), choose(quest, q, k, v).dense_mask())
    got, want = (saccade.attention(q, k, v, m, plan=p, layer=2, layers=8) for m, p in ((method, plan), (quest, None)))
    assert float((got - want).abs().max()) < 1e-14


# -- offline ---------------------------------------------------------------------------------------------------------------


def test_importance_is_the_mean_product_over_a_group_token_by_token() -> None:
    q, k, v = planted(n=64)
    plan = plan_of(DoubleSparsity(), (q[:, :, :40], k[:, :, :40], v), (q[:, :, 40:], k[:, :, 40:], v))
    want = (q.unflatten(1, (3, 2)) * k.unsqueeze(2)).abs().sum(2).mean(2).squeeze(0)
    order = plan.tensor(2, "channels")
    assert float((plan.tensor(2, "importance") - want.gather(1, order)).abs().max()) < 1e-5
    assert torch.equal(want.gather(1, order), want.sort(-1, descending=True).values)
    for head in range(3):
        assert sorted(order[head, :4].tolist()) == [c + head for c in OUTLIERS]


def test_channels_by_query_or_key_alone() -> None:
    q, k, v = planted(n=512)
    k[..., 7] *= 30  # large in keys, absent in queries
    q[..., 7] *= 1e-3
    by_key, by_query, by_both = (DoubleSparsity(by="key"), DoubleSparsity(by="query"), DoubleSparsity())
    first = [plan_of(method, (q, k, v)).tensor(2, "channels")[0, 0].item() for method in (by_key, by_query, by_both)]
    assert first[0] == 7 and first[1] in OUTLIERS and first[2] in OUTLIERS


# -- what the channels find ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4])
def test_planted_channels_find_the_tokens_and_random_ones_do_not(bits: int | None) -> None:
    """A sixteenth of the channels, a sixteenth of the tokens."""
    q, k, _ = planted()
    plan = plan_of(DoubleSparsity(), planted(seed=1))  # other text
    method = DoubleSparsity(bits=bits, sinks=0, recent=0)
    true = best(logits(q[:, :, -1:], k), 128)
    found = recall(read(method, q[:, :, -1:], k, plan), true)
    other = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    chance = recall(read(method, q[:, :, -1:], k, with_channels(other)), true)
    assert found > 0.75 and found > 0.3 + chance


@cache
def pocket_plan() -> Plan:
    """Calibrated on 1K tokens of the shipped text."""
    text = shipped_text()
    return saccade.calibrate(pocket(), "double-sparsity", [ids_of(text[at : at + 511]) for at in (0, 500_000)])


def test_the_pocket_model_finds_a_needle() -> None:
    prompt = needle()
    text, stats = answer(prompt, DoubleSparsity(channels=0.25, budget=0.25), pocket_plan())
    assert text == prompt.answer
    for layer in stats.per_layer:
        assert abs(layer["decode_density"] - (1 if layer["layer"] < 2 else 0.25)) < 0.002


def test_calibrated_channels_rank_the_pocket_models_tokens_best() -> None:
    """In the layers that retrieve and their neighbours, an eighth of the tokens by a quarter of the channels."""
    found = torch.zeros(3)
    for index in range(3, 7):
        layer = needle().layers[index]
        order = pocket_plan().tensor(index, "channels")
        random = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i)) for i in range(2)])
        for at in (1500, 1700, 1900, 2046):
            q, k = layer.q[:, :, at : at + 1], layer.k[:, :, : at + 1]
            true = best(logits(q, k), 256)
            for i, channels in enumerate((order, random, order.flip(-1))):
                found[i] += recall(read(DoubleSparsity(channels=16, budget=256), q, k, with_channels(channels)), true) / 16
    assert float(found[0]) > 0.1 + float(found[1]) and float(found[1]) > float(found[2])


def test_the_least_important_channels_lose_the_needle(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = needle()
    monkeypatch.setattr(DoubleSparsity, "chosen", lambda self, ctx, like: ctx.found("channels")[:, -4:])
    text, stats = answer(prompt, DoubleSparsity(channels=4, budget=0.0625, recent=4), pocket_plan())
    assert text != prompt.answer and abs(stats.per_layer[2]["decode_density"] - 0.0625) < 0.002


# -- labels ----------------------------------------------------------------------------------------------------------------


def test_label_bytes() -> None:
    """1 / f of a half-precision key cache, a quarter of that in 4 bits (and two numbers a token and head)."""
    q, k, v = tensors(2, 6, 2, 640, 128, dtype=torch.bfloat16)
    plan = plan_of(DoubleSparsity(), (q.expand(-1, -1, 640, -1), k, v))
    keys = k.numel() * 2
    for bits, share in ((None, 1 / 16), (4, 1 / 64)):
        ctx = context(q, k, v, plan)
        DoubleSparsity(bits=bits).observe(ctx, k, v, 0)
        labels = ctx.state["labels"].view
        assert labels.is_contiguous() and labels.nbytes == keys * share
        assert ("ranges" in ctx.state) == (bits is not None)
        assert bits is None or ctx.state["ranges"].view.nbytes == 2 * 2 * 2 * 2 * 640


def test_quantised_logits_are_those_of_the_restored_labels() -> None:
    q, k, v = planted(n=300)
    plan = plan_of(DoubleSparsity(), (q, k, v))
    q = q[:, :, -1:]
    method = DoubleSparsity(channels=0.25)
    ctx = context(q, k, v, plan)
    method.observe(ctx, k, v, 0)
    channels = plan.tensor(2, "channels")[:, :16]
    labels = k.gather(-1, channels[None, :, None].expand(1, -1, 300, -1))
    low, high = labels.amin(-1, keepdim=True), labels.amax(-1, keepdim=True)
    restored = low + ((labels - low) / (high - low) * 15).round() * (high - low) / 15
    queries = q.gather(-1, channels.repeat_interleave(2, 0)[None, :, None])
    got, want = method.label_logits(ctx, q.squeeze(2)), logits(queries, restored)
    assert float((got - want).abs().max()) < 1e-9 * float(want.abs().max())


@pytest.mark.parametrize("bits", [None, 4])
def test_taking_tokens_back_and_going_on_is_as_if_they_had_come_so(bits: int | None) -> None:
    q, k, v = tensors(2, 6, 2, 90, 16)
    plan = plan_of(DoubleSparsity(), (q.expand(-1, -1, 90, -1), k, v))
    method = DoubleSparsity(channels=4, budget=24, bits=bits)
    ctx = context(q, k, v, plan)
    assert method.rewind(ctx, 40) == 0  # nothing was observed yet
    method.observe(ctx, k[:, :, :70], v, 0)
    assert method.rewind(ctx, 61) == 61
    again = torch.cat([k[:, :, :61], tensors(2, 6, 2, 30, 16, seed=1)[1]], 2)
    for i in range(61, 91):
        method.observe(ctx, again[:, :, i : i + 1], v, i)
    assert torch.equal(method.select(ctx, q, again, v).tokens, choose(method, q, again, v, plan).tokens)


def test_without_a_plan_it_refuses() -> None:
    q, k, v = tensors(1, 4, 2, 50, 16)
    with pytest.raises(ValueError, match="double-sparsity needs a calibration plan"):
        saccade.attention(q, k, v, "double-sparsity")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 0}, "channels=0"),
        ({"channels": 1.5}, "channels=1.5"),
        ({"bits": 9}, "bits=9"),
        ({"bits": True}, "bits=True"),
        ({"by": "both"}, "by='both'"),
        ({"reduce": "max"}, "double-sparsity got reduce='max': expected one of none, group_max, group_sum"),
        ({"sinks": -1}, "sinks=-1"),
        ({"recent": 1.0}, "recent=1.0"),
        ({"dense_layers": None}, "dense_layers=None"),
        ({"budget": saccade.core.Mass(0.9)}, "reads a fixed number of tokens"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.DoubleSparsity(**fields)
