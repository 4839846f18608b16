"""magicpig: its probabilities, its estimate, its sets, and what it finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.methods.decode.harness import answer, best, choose, context, logits, needle, tensors
from torch import Tensor

import saccade
from saccade.core import Selection
from saccade.methods.decode import magicpig as module
from saccade.methods.decode.magicpig import MagicPig
from saccade.ops import decode
from saccade.parts.lsh import CollisionIndex, HashTables, collision_rate, hyperplanes, sign_codes

BARE = {"sinks": 0, "window": 1, "dense_every": 0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(bits: int, tables: int, dim: int, draws: int, keys: Tensor) -> CollisionIndex:
    """An index of keys `(n, dim)`, already centred, for every draw of the planes: draws stand in for heads."""
    planes = hyperplanes(draws, dim, tables, bits, seeded())
    index = CollisionIndex(planes, torch.zeros(1, draws, 1, dim, dtype=torch.float64))
    index.append(keys.expand(1, draws, *keys.shape))
    return index


# -- probabilities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "tables"), [(4, 20), (2, 5), (8, 60)])
def test_two_tables_match_as_often_as_the_angle_says(bits: int, tables: int) -> None:
    angles = torch.tensor([0.2, 0.6, 1.0, 1.5, 2.2], dtype=torch.float64)
    keys = torch.stack([angles.cos(), angles.sin(), torch.zeros(5)], dim=-1) * torch.tensor([[1.0], [3.0], [0.2], [1.0], [9.0]])
    draws = 2000
    index = drawn(bits, tables, 3, draws, keys)
    q = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64).expand(1, draws, 3)
    rate = (index.collisions(q) >= 2).double().mean((0, 1))
    u = collision_rate(angles.cos(), bits, tables)
    sigma = (u * (1 - u) / draws).sqrt()
    assert bool(((rate - u).abs() < 4 * sigma + 1e-9).all())
    assert bool((u.diff() < 0).all())


def test_rates_at_the_ends_are_finite() -> None:
    u = collision_rate(torch.tensor([1.0, 1.0000001, -1.0, -1.1]), 10, 150)
    assert u.tolist() == pytest.approx([1, 1, 0, 0])


def test_the_weighted_sum_over_samples_averages_to_the_sum_over_all_keys() -> None:
    n, draws = 60, 3000
    keys = torch.randn(n, 8, generator=seeded(1), dtype=torch.float64)
    one = torch.randn(8, generator=seeded(2), dtype=torch.float64)
    index = drawn(4, 20, 8, draws, keys)
    sampled = (index.collisions(one.expand(1, draws, 8)) >= 2).squeeze(0)
    u = collision_rate(torch.nn.functional.cosine_similarity(keys, one, dim=-1), 4, 20)
    each = (sampled * ((keys @ one) * 8**-0.5).exp() / u).sum(-1)
    total = ((keys @ one) * 8**-0.5).exp().sum()
    assert abs(float(each.mean() - total)) < 4 * float(each.std()) / draws**0.5
    assert float(each.std()) < 0.5 * float(total), "an estimate that swings this much tests nothing"


def errors(q: Tensor, k: Tensor, v: Tensor, method: MagicPig) -> tuple[float, float, float]:
    """Mean relative output error of the method, of exact top-k with as many tokens, and the share of tokens."""
    s = choose(method, q, k, v)
    exact = saccade.attention(q, k, v)
    top = torch.full((*q.shape[:2], 1, int(s.token_counts.max()) + 1), k.shape[2])
    scores = logits(q, k)
    for h in range(q.shape[1]):
        count = int(s.token_counts[0, h]) + 1  # and the newest key
        top[0, h, 0, :count] = scores[0, h].topk(count).indices
    best_keys = Selection.from_positions(top, n_q=1, n_k=k.shape[2])
    found = [((decode(q, k, v, x).out - exact).norm(dim=-1) / exact.norm(dim=-1)).mean() for x in (s, best_keys)]
    return float(found[0]), float(found[1]), s.density()


@pytest.mark.parametrize("case", ["flat, values follow keys", "peaked", "flat, values do not"])
def test_sampling_beats_top_k_where_top_k_is_biased_and_only_there(case: str) -> None:
    """2000 keys; where rows are flat and values follow keys, the best keys stand for others that are nothing like them."""
    q, k, _ = tensors(1, 24, 24, 2000, 32, seed=3)
    turn = torch.randn(32, 32, generator=seeded(5), dtype=torch.float64) * 32**-0.5
    noise = torch.randn(1, 24, 2000, 32, generator=seeded(6), dtype=torch.float64)
    v = 0.9 * k @ turn + 0.1 * noise
    q = q * (12 if case == "peaked" else 0.7)
    if case == "flat, values do not":
        v = 1 + 0.3 * noise
    ours, top, density = errors(q, k, v, MagicPig(bits=5, tables=24, **BARE))
    assert 0.01 < density < 0.4
    assert ours < 0.8 * top if case.startswith("flat, values follow") else top < 0.9 * ours


# -- what is read ----------------------------------------------------------------------------------------------------------


def test_sampled_keys_collide_twice_and_carry_their_weight() -> None:
    q, k, v = tensors(2, 6, 2, 300, 16)
    k = k + 3 * tensors(2, 6, 2, 1, 16, seed=9)[1]  # a cone
    method = MagicPig(bits=4, tables=12, sinks=3, window=20)
    s = choose(method, q, k, v)
    end = 300 - 1 - 20
    mean = k[:, :, 3:end].mean(2, keepdim=True)
    planes = hyperplanes(2, 16, 12, 4, replace(context(q, k, v), seen=0).generator()).double()
    keys = ((k - mean).unsqueeze(-2).unsqueeze(-2) @ planes.permute(0, 2, 1, 3)[:, None]).squeeze(-2) > 0  # B, Hk, n, L, K
    queries = (q.unflatten(1, (2, 3)).unsqueeze(-2) @ planes.permute(0, 2, 1, 3)[:, None]).squeeze(-2) > 0  # B, Hk, G, L, K
    matches = (keys[:, :, None] == queries[:, :, :, None]).all(-1).sum(-1).flatten(1, 2)
    want = matches >= 2
    want[..., :3] = want[..., end:] = True
    assert torch.equal(s.dense_mask().squeeze(2), want)
    assert 0.1 < float(want[..., 3:end].double().mean()) < 0.9
    centred = (k - mean).repeat_interleave(3, 1)
    u = collision_rate(torch.nn.functional.cosine_similarity(q, centred, dim=-1), 4, 12)
    weight = -(u + 1e-4).log()
    weight[..., :3] = 0
    assert s.log_weight is not None
    ids, real = s.tokens.squeeze(2).long(), s.tokens.squeeze(2) < 300
    assert float((s.log_weight.squeeze(2) - weight.gather(-1, ids.clamp(max=299)))[real].abs().max()) < 1e-4


def test_hash_tables_count_what_comparing_codes_counts() -> None:
    codes = torch.randint(0, 8, (2, 3, 40, 5), generator=seeded(), dtype=torch.int16)
    asked = torch.randint(0, 8, (2, 6, 5), generator=seeded(1), dtype=torch.int16)
    want = (codes.repeat_interleave(2, 1) == asked.unsqueeze(2)).sum(-1)
    tables = HashTables(codes, 3)
    assert torch.equal(tables.collisions(asked), want)
    rows = torch.tensor([1, 1, 0])
    assert torch.equal(tables.reorder(rows).collisions(asked[rows]), want[rows])
    planes = hyperplanes(3, 8, 5, 15, seeded())
    x = torch.randn(2, 3, 700, 8, generator=seeded(2))
    assert int(sign_codes(x, planes).min()) >= 0 and sign_codes(x, planes).dtype == torch.int16
    bits = (x[0, 1, 650] @ planes[1, :, 3] > 0).long()
    assert int(sign_codes(x, planes)[0, 1, 650, 3]) == int((bits << torch.arange(15)).sum())


def test_generated_tokens_are_static_until_the_next_prompt_ends() -> None:
    q, k, v = tensors(1, 4, 2, 300, 16)
    method = MagicPig(bits=4, tables=8, sinks=2, window=10)
    ctx = context(q, k, v)
    method.observe(ctx, k[:, :, :101], v, 0)
    tails = []
    for n in (101, 102, 103):
        if n > 101:
            method.observe(ctx, k[:, :, n - 1 : n], v, n - 1)
        tails.append(int(method.select(ctx, q, k[:, :, :n], v).starts.flatten()[0]))
    assert tails == [90, 90, 90]
    before = ctx.state["index"].collisions(q.squeeze(2))
    method.observe(ctx, k[:, :, 103:164], v, 103)  # 60 tokens of a second prompt, and one generated
    s = method.select(ctx, q, k[:, :, :164], v)
    assert int(s.starts.flatten()[0]) == 153 and ctx.state["index"].n == 151
    assert torch.equal(ctx.state["index"].collisions(q.squeeze(2))[..., :88], before)


@pytest.mark.parametrize("n", [1, 2, 60, 68, 70, 400])
def test_no_bits_and_short_prompts_are_dense(n: int) -> None:
    q, k, v = tensors(2, 6, 2, n, 16)
    method = MagicPig(bits=0) if n > 68 else MagicPig()
    got = saccade.attention(q, k, v, method, layer=3, layers=8)
    assert float((got - saccade.attention(q, k, v)).abs().max()) < 1e-14


def test_layers_that_read_everything() -> None:
    assert [layer for layer in range(40) if MagicPig().layer_policy(layer, 40) == "dense"] == [0, 16, 32]
    assert MagicPig(dense_every=0).layer_policy(0, 4) == "select"


def test_centring_matters_where_keys_crowd_in_a_cone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncentred, all keys look alike: nearly all are sampled or nearly none, whatever the query wants."""
    q, k, v = tensors(1, 8, 2, 1500, 32, seed=4)
    k = k + 2.5 * tensors(1, 8, 2, 1, 32, seed=9)[1]
    method = MagicPig(bits=6, tables=40, **BARE)
    true = best(logits(q, k), 60)

    def found(s: Selection) -> float:
        """Share of the best keys read over the share of all keys read."""
        mask = s.dense_mask().squeeze(2)
        return float((mask & true).sum(-1).double().div(60).mean() / mask.double().mean())

    centred = found(choose(method, q, k, v))
    init = CollisionIndex.__init__
    monkeypatch.setattr(CollisionIndex, "__init__", lambda self, planes, mean: init(self, planes, torch.zeros_like(mean)))
    assert centred > 1.4 * found(choose(method, q, k, v))


# -- the pocket model ------------------------------------------------------------------------------------------------------


def test_the_pocket_model_finds_a_needle_at_a_quarter_of_the_cache() -> None:
    text, stats = answer(needle(), MagicPig())
    assert text == needle().answer
    densities = [layer["decode_density"] for layer in stats.per_layer]
    assert densities[0] == 1 and sum(densities[1:]) / 7 < 0.25


def test_tables_of_other_keys_lose_the_needle(monkeypatch: pytest.MonkeyPatch) -> None:
    collisions = CollisionIndex.collisions

    def shifted(self: CollisionIndex, q: Tensor) -> Tensor:
        return collisions(self, q).roll(617, dims=-1)

    monkeypatch.setattr(CollisionIndex, "collisions", shifted)
    text, _ = answer(needle(), MagicPig())
    assert text != needle().answer


# -- the index -------------------------------------------------------------------------------------------------------------


def test_taking_tokens_back_keeps_the_index_while_the_hashed_keys_stay() -> None:
    q, k, v = tensors(1, 4, 2, 200, 16)
    method = MagicPig(bits=4, tables=8, sinks=2, window=10)
    ctx = context(q, k, v)
    assert method.rewind(ctx, 5) in (0, 5)
    method.observe(ctx, k[:, :, :150], v, 0)
    once = method.select(ctx, q, k[:, :, :150], v)
    assert method.rewind(ctx, 142) == 142 and "index" in ctx.state
    method.observe(ctx, k[:, :, 142:143], v, 142)
    assert torch.equal(method.select(ctx, q, k[:, :, :143], v).starts, once.starts)
    assert method.rewind(ctx, 120) == 0 and not ctx.state


def test_the_index_is_counted_and_does_not_depend_on_the_values() -> None:
    q, k, v = tensors(1, 4, 2, 500, 16)
    method = MagicPig(bits=4, tables=8, sinks=2, window=10)
    ctx = context(q, k, v)
    method.observe(ctx, k, v, 0)
    a = method.select(ctx, q, k, v)
    index: CollisionIndex = ctx.state["index"]
    listed = 2 * 8 * (4 * 487 + 4 * 17) + 2 * 16 * 8 * 4 * 4
    assert listed <= index.nbytes <= listed + 2 * 16 * 8 + 2 * 8 * (487 + 80)
    assert torch.equal(a.tokens, method.select(ctx, q, k, 2 * v).tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 16}, "bits=16. is not a whole number from 0 to 15"),
        ({"tables": 1}, "tables=1"),
        ({"sinks": -1}, "sinks=-1"),
        ({"window": 0}, "window=0"),
        ({"dense_every": 1.0}, "dense_every=1.0"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.MagicPig(**fields)
