"""DHSA (dhsa, 2510.24606): the claims of the card, on constructed keys and on the pocket model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.methods.cache.needles import pocket, prompts, streams
from tests.methods.prefill.planted import context, hits, selected
from torch import Tensor

import saccade
from saccade.attach import capture
from saccade.core import Plan, Selection
from saccade.methods import build
from saccade.methods.prefill.dhsa import DHSA
from saccade.ops import attend
from saccade.parts.boundaries import boundary_labels, boundary_scores, focal_loss, train_predictor
from saccade.parts.chunks import best_chunks, chunk_ends, chunk_starts, scaled_means, separated_peaks

N = 300
SMALL = DHSA(budget=60, local=20, sinks=10, instruction=12, block=8, chunk=9, apart=3)


def random_qkv(n_q: int, n_k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, n_q, 16), (2, 2, n_k, 16), (2, 2, n_k, 16))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


def passages(seed: int, n: int = 400) -> tuple[Tensor, Tensor, list[int]]:
    """q, k `(1, 2, n, 16)` whose keys stay the same, but for a little noise, from one change point to the next, and these points.

    Two kinds of passages take turns: one that later queries look at, and one that they don't.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(2, 2, 1, 16, generator=torch.Generator().manual_seed(99))
    places = torch.cumsum(torch.randint(12, 40, (n // 12,), generator=generator), 0)
    points = places[places < n - 20].tolist()
    kind = torch.zeros(n, dtype=torch.long)
    for point in points:
        kind[point:] ^= 1
    k = kinds[kind].permute(2, 1, 0, 3) + 0.05 * torch.randn(1, 2, n, 16, generator=generator)
    return (2 * (kinds[0] - kinds[1])).expand(1, 2, n, 16) + 0.1 * torch.randn(1, 2, n, 16, generator=generator), k, points


# -- the card's evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [N, 1.0], ids=str)
@pytest.mark.parametrize("n_q", [N, 50])
def test_opened_equals_dense(budget: float, n_q: int) -> None:
    method = replace(SMALL, budget=budget)
    q, k, v = random_qkv(n_q, N)
    exact = attend(q.double(), k.double(), v.double()).out
    rounding = (attend(q, k, v).out - exact).abs().max()
    selection = selected(method, q, k, v)
    assert selection.density() == 1.0
    assert (attend(q, k, v, selection).out - exact).abs().max() <= 2 * rounding + 1e-6
    ran: list[Selection | None] = []
    method.attend(context(q, k, v, ran=ran), q, k, v)
    assert ran == [None]


def test_chunks_of_equal_length_rank_like_pooled_means() -> None:
    q, k, v = random_qkv(N, N, torch.float64)
    method = replace(SMALL, chunk=10, sinks=0, instruction=0, budget=50)
    mask = selected(method, q, k, v).coverage()
    for b in range(2):
        pooled = k[b].mean(0).unflatten(0, (-1, 10)).mean(1)
        for tile in (20, 30, 36):
            end = (tile + 1) * 8
            scores = pooled @ q[b].mean(0)[end - 8 : end].mean(0)
            best = [c for c in scores.argsort(descending=True).tolist() if c * 10 < end - 20][:3]
            for chunk in best[:2]:  # whole chunks; of the one in which the budget ends, a part
                assert mask[b, 0, tile, chunk * 10 : min(chunk * 10 + 10, end - 20)].all()


def test_the_root_makes_long_and_short_chunks_comparable() -> None:
    x = torch.randn(1, 64 * 340, 32, generator=torch.Generator().manual_seed(0))
    starts = torch.cat([torch.arange(64) * (256 + 64 + 16 + 4) + skip for skip in (0, 256, 320, 336)]).sort().values
    scaled = scaled_means(x, starts.unsqueeze(0))[0].norm(dim=-1).unflatten(0, (-1, 4)).mean(0)
    assert float(scaled.max() / scaled.min()) < 1.1
    lengths = torch.tensor([256.0, 64.0, 16.0, 4.0])
    plain = scaled / lengths.sqrt()
    assert all(1.9 < float(plain[i + 1] / plain[i]) < 2.1 for i in range(3))


def test_learned_boundaries_hit_the_change_points() -> None:
    method = DHSA(steps=60, hidden=32, chunk=20, instruction=0)
    sums: dict[str, Tensor] = {}
    for seed in range(3):
        q, k, _ = passages(seed)
        sums = method.combine(sums, method.measure(context(q, k, k), q, k, k))
    assert sums["keys"].shape == (1200, 32) and sums["labels"].shape == (1200,)
    with torch.no_grad():  # as calibrate calls it
        tensors = {f"layer.0.{name}": value for name, value in method.conclude(sums).items()}
        again = method.conclude(sums)
    assert all(torch.equal(value, tensors[f"layer.0.{name}"]) for name, value in again.items())
    plan = Plan(slug="dhsa", spec=method.spec, fingerprint="", notes={}, tensors=tensors)
    q, k, points = passages(7)
    found = method.cut(context(q, k, k, plan=plan), k)[0].tolist()
    near = [min(abs(point - place) for place in found) for point in points]
    assert sum(distance <= 1 for distance in near) >= 0.9 * len(points), (points, found)
    even = method.cut(context(q, k, k), k)[0].tolist()
    by_chance = [min(abs(point - place) for place in even) for point in points]
    assert sum(distance <= 1 for distance in by_chance) < 0.5 * len(points)


# -- labels and the network ----------------------------------------------------------------------------------------------


def test_labels_are_the_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saccade.parts.boundaries.LATER_ROWS", 40)
    q, k, _ = random_qkv(90, 90, torch.float64)
    found = boundary_labels(2 * q, k, 4, scale=0.25)
    logits = (2 * q @ k.repeat_interleave(3, 1).mT * 0.25).masked_fill(torch.ones(90, 90).triu(1).bool(), -torch.inf)
    attention = logits.softmax(-1).mean(1)
    assert bool(found[:, :4].isnan().all()) and bool(found[:, 86:].isnan().all())
    for b in range(2):
        for p in (4, 5, 40, 84, 85):
            rows = slice(p + 4, min(90, p + 4 + 40))
            past, future = (float(attention[b, rows, side].sum()) + 1e-6 for side in (slice(p - 4, p), slice(p, p + 4)))
            ratio = max(past, future) / min(past, future)
            assert float(found[b, p]) == pytest.approx(ratio**4 / (1 + ratio**4), abs=1e-6)
    assert float(found.nan_to_num(0.5).min()) >= 0.5
    assert bool(boundary_labels(q[:, :, :8], k[:, :, :8], 4, scale=0.25).isnan().all())


def test_focal_loss_is_cross_entropy_weighted_by_the_distance() -> None:
    p, y = torch.tensor([0.2, 0.7, 0.9]), torch.tensor([1.0, 0.7, 0.0])
    expected = (0.8**2 * -torch.tensor(0.2).log() + 0.9**2 * -torch.tensor(0.1).log()) / 3
    assert float(focal_loss(p.logit(), y)) == pytest.approx(float(expected), rel=1e-5)


def test_a_gap_is_judged_by_the_keys_around_it() -> None:
    q, k, _ = passages(0)
    keys = k.transpose(1, 2).flatten(2)
    state = train_predictor(keys[0], boundary_labels(q, k, 4, scale=0.25)[0], reach=4, hidden=16, steps=2)
    scores = boundary_scores(keys, state, 4)
    assert bool((scores[:, :4] == -torch.inf).all() and (scores[:, -3:] == -torch.inf).all() and scores[:, 4:-3].isfinite().all())
    part = boundary_scores(keys[:, 96:104], state, 4)
    assert part.isfinite().sum() == 1 and torch.allclose(part[0, 4], scores[0, 100], atol=1e-6)
    assert bool((boundary_scores(keys[:, :7], state, 4) == -torch.inf).all())


# -- chunks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [0, 3, 8])
def test_suppression_is_the_greedy_walk(apart: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 40, (2, 200), generator=generator) / 40  # many ties
    scores[:, ::7] = -torch.inf
    forced = torch.tensor([0, 150])
    for count in (3, 12, 200):
        found = separated_peaks(scores, apart, count, forced)
        for b in range(2):
            taken: list[int] = []
            for place in torch.sort(scores[b], descending=True, stable=True).indices.tolist():
                if scores[b, place] > -torch.inf and len(taken) < count and all(abs(place - t) > apart for t in [0, 150, *taken]):
                    taken.append(place)
            assert found[b].nonzero().flatten().tolist() == sorted({0, 150, *taken})


def test_ragged_chunks() -> None:
    begins = torch.zeros(2, 20, dtype=torch.bool)
    begins[0, [4, 9]] = True
    starts = chunk_starts(begins)
    assert starts.tolist() == [[0, 4, 9], [0, 20, 20]] and chunk_ends(starts, 20).tolist() == [[4, 9, 20], [20, 20, 20]]
    x = torch.randn(2, 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = scaled_means(x, starts)
    assert torch.allclose(means[0, 2], x[0, 9:].mean(0) * 11**0.5) and torch.equal(means[1, 1:], torch.zeros(2, 3).double())
    assert torch.allclose(means[1, 0], x[1].mean(0) * 20**0.5)


def test_best_chunks_are_the_tokens_with_the_highest_chunk_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    begins = torch.rand(2, 90, generator=generator) < 0.12
    starts = chunk_starts(begins)
    scores = torch.randint(0, 5, (2, 4, starts.shape[1]), generator=generator).double()
    high, room = torch.tensor([0, 9, 50, 90]), torch.tensor([7, 7, 20, 100])
    found = best_chunks(scores, starts, 5, high, room, 90)
    for b in range(2):
        owner = torch.searchsorted(starts[b], torch.arange(90), right=True) - 1
        for tile in range(4):
            tokens = [t for t in range(5, int(high[tile]))]
            best = sorted(sorted(tokens, key=lambda t: (-float(scores[b, tile, owner[t]]), t))[: int(room[tile])])
            assert [t for t in found[b, tile].tolist() if t < 90] == best


# -- the selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), [(N, N), (83, N), (50, 50), (7, N)])
def test_a_block_reads_its_forced_keys_and_its_budget(n_q: int, n_k: int) -> None:
    q, k, v = random_qkv(n_q, n_k)
    found = selected(SMALL, q, k, v)
    assert (found.heads, found.block_q) == (1, 8)  # one list for all heads
    assert torch.equal(found.pairs(), found.dense_mask().sum((-1, -2)))  # nothing is listed twice
    keys = found.coverage()
    for tile in range(found.tiles):
        end = (tile + 1) * 8 + n_k - n_q
        if (tile + 1) * 8 > n_q - 12:
            assert keys[:, 0, tile].all()  # the instruction reads everything
            continue
        listed = keys[:, 0, tile, :end]
        assert listed[:, max(0, end - 20) :].all() and listed[:, : min(10, end)].all()
        assert (listed.sum(-1) == min(60, end)).all()


def test_a_chunk_begins_with_the_instruction() -> None:
    q, k, v = random_qkv(N, N)
    assert N - 12 in SMALL.cut(context(q, k, v), k)[0]


def test_no_value_from_the_future_but_keys() -> None:
    q, k, v = random_qkv(N, N)
    other = v.clone()
    other[:, :, 120:] = 7.0
    a, b = (SMALL.attend(context(q, k, x), q, k, x) for x in (v, other))
    assert torch.equal(a[:, :, :120], b[:, :, :120]) and not torch.equal(a[:, :, 120:], b[:, :, 120:])


def test_decoding_is_dense() -> None:
    q, k, v = random_qkv(1, N)
    ran: list[Selection | None] = []
    out = SMALL.attend(context(q, k, v, ran=ran), q, k, v)
    assert ran == [None] and torch.equal(out, saccade.attention(q, k, v))


@pytest.mark.parametrize(("field", "value"), [
    ("budget", 0), ("budget", 1.5), ("local", 16), ("sinks", -1), ("chunk", 0), ("steps", 0), ("threshold", 1.0), ("apart", 2.5),
])  # fmt: skip
def test_wrong_fields_are_refused_in_one_sentence(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^dhsa\({field}=") as caught:
        DHSA(**{field: value})
    assert "\n" not in str(caught.value)


def test_spec_round_trip() -> None:
    spec = "dhsa(budget=0.25, chunk=64)"
    assert build(spec).spec == spec and build("dhsa") == DHSA()


def test_samples_that_are_too_short_are_refused() -> None:
    q, k, v = random_qkv(8, 8)
    with pytest.raises(ValueError, match="no sample is longer than 8 tokens"):
        DHSA().conclude(DHSA().measure(context(q, k, v), q, k, v))


# -- the pocket model ----------------------------------------------------------------------------------------------------


@cache
def pocket_plan() -> Plan:
    return saccade.calibrate(pocket(), "dhsa(steps=3, hidden=16)", [streams(1, 255, seed=3)])


def test_a_plan_of_the_pocket_model_cuts_and_survives_saving(tmp_path: Path) -> None:
    plan = Plan.load(pocket_plan().save(tmp_path / "dhsa.safetensors"))
    ids, _ = prompts(511, (0.5,))
    with capture(pocket()) as layers, torch.no_grad():
        pocket()(ids, use_cache=False)
    method, layer = DHSA(budget=160, local=64, sinks=16, instruction=0), layers[4]
    learned = context(layer.q, layer.k, layer.v, plan=plan, layer=4, layers=8)
    starts = method.cut(learned, layer.k)[0]
    lengths = starts.diff()
    assert len(set(lengths.tolist())) > 3 and int(lengths[1:].min()) > 8 and len(starts) <= 16 + 2
    found = method.select(learned, layer.q, layer.k, layer.v)
    mass = float(found.mass(layer.q, layer.k).mean())
    # the same number of keys, but those beside the forced ones drawn at random
    drawn = found.coverage()
    high = (torch.arange(1, 17) * 32 - 64).clamp(min=16)
    room = torch.arange(512).expand(16, -1)
    free = (room >= 16) & (room < high.unsqueeze(-1))
    count = (drawn & free).sum(-1, keepdim=True)
    noise = torch.rand(drawn.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~free, 2.0)
    random = Selection.from_token_mask((drawn & ~free) | (noise.argsort(-1).argsort(-1) < count), block_q=32, n_q=512)
    assert random.density() == pytest.approx(found.density(), abs=1e-6) and found.density() < 0.55
    assert mass > float(random.mass(layer.q, layer.k).mean())
    with pytest.raises(ValueError, match=r"has no 'boundaries\.mix\.weight' for layer 9"):
        method.cut(replace(learned, layer=9), layer.k)


@pytest.mark.slow
def test_needles_are_found() -> None:
    ids, answers = prompts(1023, (0.3, 0.7))
    found, density = hits(ids, answers, DHSA(budget=0.5, local=64, sinks=16), pocket_plan())
    assert found == 2 and density < 0.85
