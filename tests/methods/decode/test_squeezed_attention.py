"""squeezed-attention: its shares, its threshold over layers and heads, its hierarchy, and what it finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.decode.harness import best, context, logits, needle, pocket, recall, tensors
from torch import Tensor

import saccade
from saccade.core import LayerContext, Selection
from saccade.methods.decode import squeezed_attention
from saccade.methods.decode.squeezed_attention import SqueezedAttention
from saccade.ops import decode
from saccade.parts import shares
from saccade.parts.shares import centroid_logits, key_shares, share_histogram, share_quantile


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at(ctx: LayerContext, layer: int = 2, sequence: dict[str, Any] | None = None) -> LayerContext:
    ctx.layer, ctx.phase = layer, "decode"
    ctx.sequence = {} if sequence is None else sequence
    return ctx


def ready(method: SqueezedAttention, q: Tensor, k: Tensor, **options: Any) -> LayerContext:
    ctx = at(context(q, k, k), **options)
    method.observe(ctx, k, k, 0)
    return ctx


def grouped(seed: int = 0, heads: int = 2, n: int = 1200, groups: int = 60) -> tuple[Tensor, Tensor]:
    """q `(1, 2 heads, 1, 32)` and keys in groups that are scattered over the positions, q near one group."""
    g = seeded(seed)
    centres = 2 * torch.randn(1, heads, groups, 32, generator=g, dtype=torch.float64)
    which = torch.randint(groups, (n,), generator=g)
    k = centres[:, :, which] + 0.5 * torch.randn(1, heads, n, 32, generator=g, dtype=torch.float64)
    q = centres[:, :, :1].repeat_interleave(2, 1) + 0.5 * torch.randn(1, 2 * heads, 1, 32, generator=g, dtype=torch.float64)
    return q, k


# -- shares ----------------------------------------------------------------------------------------------------------------


def test_one_key_a_cluster_makes_shares_the_softmax() -> None:
    q, k, _ = tensors(2, 6, 2, 90, 16)
    method = SqueezedAttention(clusters=1.0, window=9, threshold=0.01)
    ctx = ready(method, q, k)
    got = method._shares(ctx, q, "fine").squeeze(2).exp().gather(-1, ctx.state["labels"].repeat_interleave(3, 1))
    want = (logits(q, k)[..., :80] * 16**-0.5).softmax(-1)
    assert float((got - want).abs().max()) < 1e-12
    mask = method.select(ctx, q, k, k).dense_mask().squeeze(2)
    assert torch.equal(mask[..., :80], want > 0.01) and bool(mask[..., 80:].all())


def test_shares_of_all_keys_add_up_to_one() -> None:
    q, k = grouped()
    method = SqueezedAttention(clusters=0.05, coarse=0.01, window=50)
    ctx = ready(method, q, k)
    for level in ("fine", "coarse"):
        counts = ctx.state[f"{level}_counts"]
        assert torch.equal(counts.sum(-1), torch.full((1, 2), 1149.0, dtype=torch.float64))
        assert float(((method._shares(ctx, q, level).exp().squeeze(2) * counts.repeat_interleave(2, 1)).sum(-1) - 1).abs().max()) < 1e-12
    alive = torch.rand(1, 4, 1, ctx.state["fine"].shape[2], generator=seeded()) < 0.3
    some = method._shares(ctx, q, "fine", alive)
    assert float(((some.exp().squeeze(2) * ctx.state["fine_counts"].repeat_interleave(2, 1)).sum(-1) - 1).abs().max()) < 1e-12
    assert bool((some[~alive] == -torch.inf).all())
    wide = method._shares(ctx, q.repeat(1, 1, 2, 1), "fine", alive.repeat(1, 1, 2, 1))  # many queries take the other way
    assert float((wide.exp() - some.exp()).abs().max()) < 1e-12


def test_centroids_are_means_of_keys_as_they_are_clustered_by_direction() -> None:
    g = seeded(3)
    ways = torch.linalg.qr(torch.randn(32, 8, generator=g, dtype=torch.float64))[0].mT
    which = torch.arange(8).repeat(50)
    lengths = torch.rand(400, 1, generator=g, dtype=torch.float64) * 9 + 0.5
    k = (ways[which] * lengths).view(1, 1, 400, 32)
    ctx = ready(SqueezedAttention(clusters=8 / 389, window=10), k[:, :, :1], k)
    labels = ctx.state["labels"].flatten()
    assert all(len(set(labels[which[:389] == i].tolist())) == 1 for i in range(8))
    for i in range(8):
        mean = k[0, 0, :389][which[:389] == i].mean(0)
        assert float((ctx.state["fine"][0, 0, labels[i]] - mean).abs().max()) < 1e-12


# -- the threshold ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 50, 300])
def test_threshold_zero_equals_dense(n: int) -> None:
    q, k, v = tensors(2, 6, 2, n, 16)
    two = SqueezedAttention(threshold=0.0, coarse_threshold=0.0, coarse=0.02, window=30)
    for method in (SqueezedAttention(threshold=0.0, window=30), two):
        got = saccade.attention(q, k, v, method, layer=2, layers=8)
        assert float((got - saccade.attention(q, k, v)).abs().max()) < 1e-14


def test_one_threshold_over_heads_retains_more_mass_than_equal_counts() -> None:
    """Heads of different sharpness; exact with one key a cluster: no choice of as many keys covers more."""
    q, k, _ = tensors(1, 8, 8, 600, 32)
    q = q * torch.tensor([0.2, 0.5, 1, 2, 4, 6, 8, 12], dtype=torch.float64).view(1, 8, 1, 1)
    method = SqueezedAttention(clusters=1.0, window=99, threshold=0.004)
    s = method.select(ready(method, q, k), q, k, k)
    weights = (logits(q, k)[..., :500] * 32**-0.5).softmax(-1)
    mask = s.dense_mask().squeeze(2)[..., :500]
    total = int(mask.sum())
    equal = best(weights, -(-total // 8))  # a few more keys than ours
    most = weights.flatten().topk(total).values.sum()
    assert float((weights * mask).sum()) > 0.3 + float((weights * equal).sum())
    assert abs(float((weights * mask).sum() - most)) < 1e-9
    assert len(set(mask.sum(-1).flatten().tolist())) == 8, "heads get budgets of their own"


@pytest.mark.parametrize("budget", [0.1, 0.3, 1.0])
def test_the_quantile_lets_the_budget_pass(budget: float) -> None:
    g = seeded(8)
    values, counts = torch.randn(2, 4, 5, 300, generator=g) * 3 - 8, torch.randint(0, 5, (2, 2, 300), generator=g)
    values[1] += 1
    histograms = [share_histogram(part, counts) for part in values.split(2, dim=2)]
    limit = share_quantile(histograms, budget)
    weights = counts.repeat_interleave(2, 1).unsqueeze(2).expand(values.shape).double()
    passed = ((values > limit.view(2, 1, 1, 1)) * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))
    assert bool((passed <= budget + 1e-9).all()) and bool((passed > budget - 0.01).all())
    assert bool(limit[0] != limit[1]) or budget == 1.0, "rows of a batch have thresholds of their own"
    assert abs(shares.BINS * shares.WIDTH + shares.LOWEST) < 1e-9, "the bins end at a share of 1"


def test_layers_share_one_threshold_measured_by_the_prompts_last_queries() -> None:
    method = SqueezedAttention(clusters=0.2, window=40, budget=0.25)
    sequence: dict[str, Any] = {}
    prompts = [tensors(1, 4, 2, 500, 16, seed=s) for s in range(3)]
    prompts = [((3 * s + 0.5) * q, k, v) for s, (q, k, v) in enumerate(prompts)]  # layers of different sharpness
    runs = []
    for layer, (_, k, v) in enumerate(prompts):
        rows = torch.randn(1, 4, 500, 16, generator=seeded(layer + 20), dtype=torch.float64) * (3 * layer + 0.5)
        ctx = context(rows, k, v)
        ctx.layer, ctx.phase, ctx.sequence, ctx.attend = layer, "prefill", sequence, lambda q, *_: q
        for end in (200, 500):  # in two pieces
            ctx.seen = end
            method.attend(ctx, rows[:, :, end - (200 if end == 200 else 300) : end], k, v)
        more = torch.cat([k, k[:, :, :1]], dim=2)
        step = ready(method, rows[:, :, :1], more, layer=layer, sequence=sequence)
        assert torch.equal(step.state["queries"], rows[:, :, 460:])
        runs.append((step, rows, more))
    kept = []
    for step, rows, k in runs:
        assert method.select(step, rows[:, :, :1], k, k).density() == 1  # the step that measures
    for step, rows, k in runs:
        later, share = torch.cat([k, k[:, :, :1]], dim=2), 0.0
        for i in range(460, 500):
            s = method.select(step, rows[:, :, i : i + 1], later, later)
            share += float(s.token_counts.double().mean()) / 460 / 40
        kept.append(share)
    assert abs(sum(kept) / 3 - 0.25) < 0.02, "over all layers the budget passes"
    assert max(kept) - min(kept) > 0.1, "layers differ"


def test_a_step_works_the_threshold_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    method, sequence = SqueezedAttention(clusters=0.2, window=20), {}
    layers = []
    for layer in range(3):
        q, k, _ = tensors(1, 4, 2, 200, 16, seed=layer)
        layers.append((ready(method, q, k, layer=layer, sequence=sequence), q, k))
    for ctx, q, k in layers:
        assert method.select(ctx, q, k, k).density() == 1
    calls = []
    monkeypatch.setattr(squeezed_attention, "share_quantile", lambda *given: calls.append(given) or share_quantile(*given))
    for _ in range(2):
        shared: dict[str, Any] = {}
        for ctx, q, k in layers:
            ctx.shared, more = shared, torch.cat([k, k[:, :, :1]], dim=2)
            assert method.select(ctx, q, more, more).density() < 1
    assert [len(measured) for measured, _ in calls] == [3, 3]


def test_queries_of_tokens_taken_back_do_not_count() -> None:
    method = SqueezedAttention(window=20)
    q, k, v = tensors(1, 4, 2, 100, 16)
    rows = torch.randn(1, 4, 100, 16, generator=seeded(), dtype=torch.float64)
    ctx = context(rows, k, v)
    ctx.phase, ctx.attend = "prefill", lambda q, *_: q
    method.attend(ctx, rows, k, v)
    step = at(context(q, k[:, :, :96], v), sequence=ctx.sequence)
    method.observe(step, k[:, :, :96], v, 0)  # five guesses were wrong, one token is new
    assert torch.equal(step.state["queries"], rows[:, :, 75:95])


# -- the hierarchy ---------------------------------------------------------------------------------------------------------


def test_the_second_pass_looks_among_what_the_first_leaves() -> None:
    q, k = grouped(seed=1)
    method = SqueezedAttention(clusters=0.05, coarse=0.01, window=49, threshold=0.002, coarse_threshold=0.0005)
    ctx = ready(method, q, k)
    mask = method.select(ctx, q, k, k).dense_mask().squeeze(2)[..., :1150]
    s1 = key_shares(centroid_logits(q, ctx.state["coarse"], 32**-0.5), ctx.state["coarse_counts"])
    parents = ctx.state["parents"].repeat_interleave(2, 1)
    alive = (s1.squeeze(2).exp() > 0.0005).gather(-1, parents)
    assert 0 < int(alive.sum()) < alive.numel()
    weights = (centroid_logits(q, ctx.state["fine"], 32**-0.5).squeeze(2).exp()) * alive
    s2 = weights / (weights * ctx.state["fine_counts"].repeat_interleave(2, 1)).sum(-1, keepdim=True)
    want = (s2 > 0.002).gather(-1, ctx.state["labels"].repeat_interleave(2, 1))
    assert torch.equal(mask, want) and 0 < int(want.sum()) < want.numel()
    assert ctx.state["coarse"].shape[2] == round(0.01 * 1150) and ctx.state["fine"].shape[2] == round(0.05 * 1150)


def test_coarse_centroids_are_means_of_all_their_keys() -> None:
    q, k = grouped()
    ctx = ready(SqueezedAttention(clusters=0.05, coarse=0.01, window=49), q, k)
    top = ctx.state["parents"].gather(-1, ctx.state["labels"])
    for j in range(3):
        mean = k[0, 1, :1150][top[0, 1] == j].mean(0)
        assert float((ctx.state["coarse"][0, 1, j] - mean).abs().max()) < 1e-9


def test_the_hierarchy_measures_in_two_steps() -> None:
    q, k = grouped()
    method = SqueezedAttention(clusters=0.05, coarse=0.01, window=50, budget=0.2)
    ctx = ready(method, q, k[:, :, :1198])
    densities = [method.select(ctx, q, k[:, :, : 1198 + i], k).density() for i in range(3)]
    assert densities[:2] == [1, 1] and densities[2] < 0.35


# -- what clusters find ----------------------------------------------------------------------------------------------------


def test_clusters_find_top_keys_that_means_of_neighbours_lose() -> None:
    q, k = grouped(seed=2)
    method = SqueezedAttention(clusters=0.05, window=49, threshold=0.0)
    ctx = ready(method, q, k)
    scores = method._shares(ctx, q, "fine").squeeze(2).gather(-1, ctx.state["labels"].repeat_interleave(2, 1))
    blocks = torch.stack([part.mean(2) for part in k[:, :, :1150].tensor_split(58, dim=2)], dim=2)
    sizes = torch.tensor([part.shape[0] for part in torch.arange(1150).tensor_split(58)])
    by_mean = logits(q, blocks).repeat_interleave(sizes, dim=-1)
    true = best(logits(q, k)[..., :1150], 20)
    assert recall(best(scores, 60), true) > 0.9 > 0.4 > recall(best(by_mean, 60), true)


def generate(method: SqueezedAttention) -> tuple[str, saccade.Stats]:
    prompt = needle()
    model: Any = pocket()
    with saccade.attach(model, decode=method) as handle, torch.no_grad():
        out = model.generate(prompt.ids, max_new_tokens=len(prompt.answer), do_sample=False)
        stats = handle.stats()
    return bytes(b - 3 for b in out[0, prompt.ids.shape[1] :].tolist() if b >= 3).decode(errors="replace"), stats


@pytest.mark.parametrize("coarse", [None, 0.01])
def test_the_pocket_model_finds_a_needle(coarse: float | None) -> None:
    """Six answer digits are decoded; one of them (with a hierarchy two) densely."""
    text, stats = generate(SqueezedAttention(budget=0.2, iterations=15, coarse=coarse))
    assert text == needle().answer
    dense = 1 if coarse is None else 2
    assert stats.decode_density is not None
    later = (6 * stats.decode_density - dense) / (6 - dense)
    assert later < 0.3
    assert len({round(layer["decode_density"], 3) for layer in stats.per_layer}) > 4, "layers get budgets of their own"


@pytest.mark.slow
def test_other_labels_lose_the_needle(monkeypatch: pytest.MonkeyPatch) -> None:
    select = SqueezedAttention.select

    def moved(self: SqueezedAttention, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        if "turned" not in ctx.state:
            ctx.state["labels"], ctx.state["turned"] = ctx.state["labels"].roll(531, dims=-1), True
        return select(self, ctx, q, k, v)

    monkeypatch.setattr(SqueezedAttention, "select", moved)
    text, _ = generate(SqueezedAttention(budget=0.1, iterations=15))
    assert text != needle().answer


# -- the index -------------------------------------------------------------------------------------------------------------


def test_selected_keys_and_the_rest_are_one_softmax() -> None:
    q, k, v = tensors(1, 6, 2, 300, 16)
    method = SqueezedAttention(threshold=0.004, window=30, clusters=0.3)
    s = method.select(ready(method, q, k), q, k, v)
    mask = s.dense_mask().squeeze(2)
    weights = (logits(q, k) * 16**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    want = (weights.unflatten(1, (2, 3)) @ v).flatten(1, 2).unsqueeze(2)
    assert float((decode(q, k, v, s).out - want).abs().max()) < 1e-14


def test_taking_tokens_back_keeps_the_index_while_the_prompt_stays() -> None:
    q, k, _ = tensors(1, 4, 2, 120, 16)
    method = SqueezedAttention(window=20, clusters=0.2)
    ctx = ready(method, q, k[:, :, :101])
    method.select(ctx, q, k[:, :, :101], k)
    assert ctx.state["labels"].shape[2] == 80 and all(isinstance(x, Tensor) for x in ctx.state.values())
    assert method.rewind(ctx, 100) == 100 and ctx.state
    assert method.rewind(ctx, 99) == 0 and not ctx.state and not ctx.sequence


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0.0}, "budget=0.0"),
        ({"budget": 100}, "budget=100"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"window": 0}, "window=0"),
        ({"clusters": 1.5}, "clusters=1.5"),
        ({"iterations": True}, "iterations=True"),
        ({"coarse": 0.1}, "a first pass has fewer centroids"),
        ({"coarse": 0.01, "coarse_budget": 0.2}, "lets at least the budget"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SqueezedAttention(**fields)
