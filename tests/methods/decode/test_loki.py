"""loki: its basis, its ranking, what it finds, and what its index costs."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
import torch
from tests.methods.decode.harness import answer, best, choose, context, ids_of, logits, needle, pocket, recall, tensors
from torch import Tensor

import saccade
from saccade.core import Plan
from saccade.evaluate.text import shipped_text
from saccade.methods import build
from saccade.methods.decode import loki as module
from saccade.methods.decode.loki import Loki
from saccade.ops import decode
from saccade.ops.estimate import Reduce
from saccade.parts.heads import reduce_heads


def stretched(seed: int = 0, n: int = 3000) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of 6 query and 2 key heads whose keys lie near a 6-dim subspace of 32, turned at random, plus an offset."""
    q, k, v = tensors(1, 6, 2, n, 32, seed=seed)
    g = torch.Generator().manual_seed(99)  # the subspace belongs to the model, not to the text
    turn = torch.linalg.qr(torch.randn(2, 32, 32, generator=g, dtype=torch.float64))[0]
    scale = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.5, 2.0] + [0.3] * 26, dtype=torch.float64)
    k = (k * scale) @ turn.mT
    return q, k, v


def plan_of(method: Loki, *keys: Tensor) -> Plan:
    """The plan for layer 2 from some keys."""
    sums: dict[str, Tensor] = {}
    for k in keys:
        for name, value in method.measure(context(k[:, :, :1], k, k), k, k, k).items():
            sums[name] = sums[name] + value if name in sums else value
    tensors_ = {f"layer.2.{name}": value for name, value in method.conclude(sums).items()}
    return Plan(slug="loki", spec=method.spec, fingerprint="", tensors=tensors_, notes={})


def with_basis(basis: Tensor) -> Plan:
    explained = torch.linspace(0, 1, basis.shape[-1]).expand(basis.shape[:2])
    return Plan(
        slug="loki", spec="loki", fingerprint="", tensors={"layer.2.basis": basis, "layer.2.explained": explained}, notes={}
    )


def read(method: Loki, q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    """`(B, Hq, n)` bool."""
    return choose(method, q, k, k, plan).dense_mask().squeeze(2)


# -- exactness ----------------------------------------------------------------------------------------------------------


def test_all_dims_choose_the_exact_top_k() -> None:
    q, k, v = tensors(2, 6, 2, 203, 16)
    plan = plan_of(Loki(), tensors(1, 6, 2, 100, 16, seed=5)[1])
    for dims in (16, 1.0, 99):
        s = choose(Loki(dims=dims, budget=0.2), q, k, v, plan)
        exact = best(logits(q, k), 41)  # 0.2 of 203, rounded up
        assert torch.equal(s.dense_mask().squeeze(2), exact)
    weights = (logits(q, k) * 16**-0.5).masked_fill(~exact, -torch.inf).softmax(-1)
    want = (weights.unflatten(1, (2, 3)) @ v).flatten(1, 2).unsqueeze(2)
    assert float((decode(q, k, v, s).out - want).abs().max()) < 1e-14


@pytest.mark.parametrize("n", [1, 40, 203])
def test_a_budget_for_all_equals_dense(n: int) -> None:
    q, k, v = tensors(2, 6, 2, n, 16)
    plan = plan_of(Loki(), k)
    for budget in (1.0, n, n + 7):
        got = saccade.attention(q, k, v, Loki(budget=budget), plan=plan, layer=2, layers=8)
        assert float((got - saccade.attention(q, k, v)).abs().max()) < 1e-14


def test_ranking_is_by_the_leading_coordinates_of_query_and_key() -> None:
    q, k, _ = stretched()
    plan = plan_of(Loki(), k)
    basis = plan.tensor(2, "basis").double()[:, :, :4]
    approximate = logits((q.unflatten(1, (2, 3)).squeeze(3) @ basis).flatten(1, 2).unsqueeze(2), k @ basis)
    assert torch.equal(read(Loki(dims=4, budget=100), q, k, plan), best(approximate, 100))


@pytest.mark.parametrize("reduce", ["none", "group_max", "group_sum"])
def test_heads_of_a_group_choose_together(reduce: Reduce) -> None:
    q, k, v = tensors(2, 6, 2, 203, 16)
    plan = plan_of(Loki(), tensors(1, 6, 2, 100, 16, seed=5)[1])
    method = Loki(dims=1.0, budget=41, reduce=reduce)
    found = choose(method, q, k, v, plan)
    exact = best(reduce_heads(logits(q, k), 2, reduce), 41)
    assert found.heads == (6 if reduce == "none" else 2) and torch.equal(found.dense_mask().squeeze(2), exact)
    seen = exact if reduce == "none" else exact.repeat_interleave(3, 1)
    weights = (logits(q, k) * 16**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    want = (weights.unflatten(1, (2, 3)) @ v).flatten(1, 2).unsqueeze(2)
    got = saccade.attention(q, k, v, method, plan=plan, layer=2, layers=8)
    assert float((got - want).abs().max()) < 1e-14


def test_a_group_looks_by_its_best_head_for_what_one_head_alone_needs() -> None:
    q, k, _ = tensors(1, 4, 1, 300, 16)
    q[:, 1:] = -0.5 * q[:, :1]  # three heads look away from what the first looks for
    k[:, :, 70] = 3 * q[:, :1, 0]
    plan = with_basis(torch.eye(16).expand(1, 16, 16))
    by_best, by_sum = (Loki(dims=1.0, budget=10, reduce="group_max"), Loki(dims=1.0, budget=10, reduce="group_sum"))
    assert bool(read(by_best, q, k, plan)[0, 0, 70]) and not bool(read(by_sum, q, k, plan)[0, 0, 70])


# -- what the basis is worth --------------------------------------------------------------------------------------------


def test_recall_rises_with_dims_and_beats_raw_channels_and_random_directions() -> None:
    q, k, _ = stretched()
    plan = plan_of(Loki(), stretched(seed=1)[1])  # from other text
    true = best(logits(q, k), 300)
    by_dims = [recall(read(Loki(dims=d, budget=300), q, k, plan), true) for d in (2, 4, 8, 32)]
    assert by_dims == sorted(by_dims) and by_dims[-1] == 1 and by_dims[2] > 0.8
    turn = torch.linalg.qr(torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(3)))[0]
    raw = read(Loki(dims=8, budget=300), q, k, with_basis(torch.eye(32).expand(2, 32, 32)))
    random = read(Loki(dims=8, budget=300), q, k, with_basis(turn))
    assert by_dims[2] > 0.2 + max(recall(raw, true), recall(random, true))


@cache
def pocket_plan() -> Plan:
    """Calibrated on 1K tokens of the shipped text."""
    text = shipped_text()
    return saccade.calibrate(pocket(), "loki", [ids_of(text[at : at + 511]) for at in (0, 500_000)])


def test_the_pocket_models_keys_are_low_dimensional() -> None:
    """Half of the dims hold 90% of the variance."""
    shares = torch.stack([pocket_plan().tensor(layer, "explained")[:, 31] for layer in range(8)])
    assert float(shares.mean()) > 0.9


def test_the_basis_ranks_the_pocket_models_tokens_best() -> None:
    """In the layers that retrieve and their neighbours (below, most variance is one direction that all keys share)."""
    turn = torch.linalg.qr(torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(3)))[0]
    raw = torch.eye(64).expand(2, 64, 64)
    found = torch.zeros(3, 3)  # by basis and dims
    for index in range(3, 7):
        layer = needle().layers[index]
        for at in (1500, 1700, 1900, 2046):
            q, k = layer.q[:, :, at : at + 1], layer.k[:, :, : at + 1]
            true = best(logits(q, k), 256)
            for i, basis in enumerate((pocket_plan().tensor(index, "basis"), raw, turn)):
                for j, d in enumerate((4, 16, 64)):
                    found[i, j] += recall(read(Loki(dims=d, budget=256), q, k, with_basis(basis)), true) / 16
    assert float(found[:, 2].min()) > 0.999  # any orthogonal basis with all its columns ranks exactly
    assert bool((found.diff(dim=1) > 0).all())
    assert float(found[0, 1]) > 0.1 + float(found[1:, 1].max())


@pytest.mark.parametrize("method", [Loki(), Loki(budget=0.1), Loki(variance=0.9, budget=0.1)], ids=lambda m: m.spec)
def test_the_pocket_model_finds_a_needle(method: Loki) -> None:
    prompt = needle()
    text, stats = answer(prompt, method, pocket_plan())
    assert text == prompt.answer
    assert stats.decode_density is not None and abs(stats.decode_density - method.budget) < 0.002


def test_random_tokens_of_the_same_number_and_too_few_dims_lose_the_needle(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, rng = needle(), Random(0)
    text, _ = answer(prompt, Loki(dims=2, budget=0.05), pocket_plan())
    assert text != prompt.answer

    def random(q: Tensor, rows: Tensor, reduce: str) -> Tensor:
        return torch.rand(*q.shape[:2], rows.shape[2], generator=torch.Generator().manual_seed(rng.getrandbits(30)))

    monkeypatch.setattr(module, "dots", random)
    text, stats = answer(prompt, Loki(), pocket_plan())
    assert text != prompt.answer and abs(stats.decode_density - 0.25) < 0.002


# -- offline ------------------------------------------------------------------------------------------------------------


def test_measured_parts_conclude_as_the_whole() -> None:
    _, k, _ = stretched()
    whole, parts = plan_of(Loki(), k), plan_of(Loki(), *k.split(700, dim=2))
    for name in ("basis", "explained"):
        assert float((whole.tensor(2, name) - parts.tensor(2, name)).abs().max()) < 1e-5
    basis = whole.tensor(2, "basis")
    assert basis.shape == (2, 32, 32) and float((basis.mT @ basis - torch.eye(32)).abs().max()) < 1e-5


def test_a_variance_target_chooses_the_dims_of_a_layer() -> None:
    q, k, v = stretched()
    plan = plan_of(Loki(), k)
    explained = plan.tensor(2, "explained")
    for target in (0.5, 0.9, 0.99):
        ctx = context(q, k, v, plan)
        Loki(variance=target).observe(ctx, k, v, 0)
        d = ctx.state["coordinates"].view.shape[-1]
        assert bool((explained[:, d - 1] >= target).all()) and bool((explained[:, d - 2] < target).any())


def test_without_a_plan_it_refuses() -> None:
    q, k, v = tensors(1, 4, 2, 50, 16)
    with pytest.raises(ValueError, match="loki needs a calibration plan"):
        saccade.attention(q, k, v, "loki")
    with pytest.raises(ValueError, match="loki needs a calibration plan"):
        saccade.attach(pocket(), decode="loki")
    with pytest.raises(ValueError, match="no 'basis' for layer 2"):
        empty = Plan(slug="loki", spec="loki", fingerprint="", tensors={}, notes={})
        saccade.attention(q, k, v, "loki", plan=empty, layer=2, layers=8)


def test_plans_survive_a_file(tmp_path: object) -> None:
    path = pocket_plan().save(f"{tmp_path}/loki.safetensors")
    again = Plan.load(path)
    assert all(torch.equal(again.tensors[name], value) for name, value in pocket_plan().tensors.items())
    again.check_model(pocket())


# -- the index ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dims", "d"), [(0.25, 16), (8, 8)])
def test_the_index_is_d_of_D_of_the_keys_and_the_cache_stays_whole(dims: float | int, d: int) -> None:
    prompt = needle()
    _, plain = answer(prompt, "quest(dense_layers=8)")
    _, stats = answer(prompt, Loki(dims=dims), pocket_plan())
    keys = stats.tokens_seen * 8 * 2 * 64 * 4
    assert 1 <= (stats.index_bytes - plain.index_bytes) / (keys * d / 64) < 1.06  # room for tokens to come
    assert stats.kv_bytes == plain.kv_bytes


def test_coordinates_in_pieces_taken_back_and_reordered() -> None:
    q, k, v = tensors(3, 4, 2, 90, 16)
    plan, method = plan_of(Loki(), k), Loki(budget=20)
    ctx = context(q, k, v, plan)
    assert method.rewind(ctx, 40) == 0  # nothing was observed yet
    method.observe(ctx, k[:, :, :50], v, 0)
    method.observe(ctx, k[:, :, 50:], v, 50)
    assert method.rewind(ctx, 61) == 61
    rows = torch.tensor([2, 2, 0])
    ctx.state["coordinates"] = ctx.state["coordinates"].reorder(rows)
    other = tensors(3, 4, 2, 30, 16, seed=1)[1]
    method.observe(ctx, other, other, 61)
    again = torch.cat([k[rows, :, :61], other], 2)
    assert torch.equal(method.select(ctx, q, again, again).tokens, choose(method, q, again, again, plan).tokens)


def test_half_precision_stores_half_precision() -> None:
    q, k, _ = (x.bfloat16() for x in stretched())
    plan = plan_of(Loki(), k)
    ctx = context(q, k, k, plan)
    Loki(dims=8).observe(ctx, k, k, 0)
    assert ctx.state["coordinates"].view.dtype == torch.bfloat16
    true = best(logits(q.double(), k.double()), 300)
    exact = recall(read(Loki(dims=8, budget=300), q.double(), k.double(), plan), true)
    assert abs(recall(read(Loki(dims=8, budget=300), q, k, plan), true) - exact) < 0.02


# -- fields -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dims": 0}, "loki got dims=0"),
        ({"dims": 1.5}, "loki got dims=1.5"),
        ({"dims": True}, "loki got dims=True"),
        ({"variance": 0.0}, "loki got variance=0.0"),
        ({"variance": 1.1}, "loki got variance=1.1"),
        ({"budget": 0.0}, "budget 0.0 is not a ratio"),
        ({"reduce": "vote"}, "loki got reduce='vote': expected one of none, group_max, group_sum"),
        ({"budget": saccade.core.Threshold(0.1)}, "loki reads a fixed number of tokens"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loki(**fields)


def test_spec_round_trip() -> None:
    for spec in ("loki", "loki(dims=32, budget=0.125)", "loki(variance=0.9)", "loki(reduce='group_max')"):
        assert build(spec).spec == spec
