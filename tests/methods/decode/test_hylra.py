"""hylra: the dynamic program, the two statistics, and layers that read what another layer chose."""

from __future__ import annotations

from functools import cache
from itertools import product
from random import Random
from typing import Any

import pytest
import torch
from tests.methods.decode.harness import answer, best, ids_of, logits, needle, pocket
from tests.methods.decode.stack import Layer, dense, listed, over, random_stack, run_stack, stack_context, worst
from torch import Tensor

import saccade
from saccade.core import LayerContext, Mass, Plan
from saccade.evaluate.text import grammar
from saccade.methods import build
from saccade.methods.decode.hylra import HyLRA
from saccade.parts.page_mass import page_sums
from saccade.parts.planner import planned_roles, step_logits
from saccade.parts.reuse_plan import cheapest_reuse

# -- the program --------------------------------------------------------------------------------------------------------


def trying_everything(similarity: Tensor, theta: float, forced: set[int]) -> tuple[int, float]:
    """The least number of full layers and the highest similarity with it, over all 2^(L - 1) policies."""
    found = []
    for full in product((True, False), repeat=len(similarity) - 1):
        valid, count, gain, source = True, 1, 0.0, 0
        for layer, reads_all in enumerate(full, 1):
            if reads_all:
                count, source = count + 1, layer
            else:
                valid = valid and layer not in forced and float(similarity[source, layer]) >= theta
                gain += float(similarity[source, layer])
        if valid:
            found.append((count, -gain))
    count, gain = min(found)
    return count, -gain


@pytest.mark.parametrize("seed", range(8))
def test_the_program_finds_what_trying_everything_finds(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    depth = 3 + seed
    similarity = torch.rand(depth, depth, generator=g, dtype=torch.float64)
    for theta in (0.3, 0.5, 0.8):
        for forced in (set(), {1}, {depth - 1, depth // 2}):
            sources = cheapest_reuse(similarity, theta, forced)
            full = [layer for layer, source in enumerate(sources) if source == layer]
            gain = sum(float(similarity[source, layer]) for layer, source in enumerate(sources) if source != layer)
            assert (len(full), pytest.approx(gain)) == trying_everything(similarity, theta, forced)
            assert sources[0] == 0 and forced <= set(full)
            for layer, source in enumerate(sources):  # only the last choice is valid
                assert source == max(x for x in full if x <= layer)


def test_the_ends_of_theta() -> None:
    similarity = torch.rand(9, 9, generator=torch.Generator().manual_seed(0))
    assert cheapest_reuse(similarity, 1.01) == list(range(9))
    assert cheapest_reuse(similarity, 0.0) == [0] * 9
    counts = [len(set(cheapest_reuse(similarity, theta / 20, {3}))) for theta in range(22)]
    assert counts == sorted(counts) and counts[0] == 2 and counts[-1] == 9
    assert cheapest_reuse(torch.zeros(0, 0), 0.5) == []


# -- the statistics -----------------------------------------------------------------------------------------------------

TINY = HyLRA(budget=24, block=8, recent=1)


def prompt_stack(depth: int, n: int = 96) -> list[Layer]:
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, h, n, 16, generator=g, dtype=torch.float64) for h in (6, 2, 2)) for _ in range(depth)]


def measured(method: HyLRA, layers: list[Layer]) -> dict[int, dict[str, Tensor]]:
    shared: dict[str, Any] = {}
    sums = {}
    for number, (q, k, v) in enumerate(layers):
        ctx = stack_context(number, len(layers), q, k, v, shared, [])
        sums[number] = method.measure(ctx, q, k, v)
    return sums


def test_sensitivity_is_the_change_of_the_output_and_the_attention_left_out() -> None:
    layers = prompt_stack(2)
    sums = measured(TINY, layers)
    for number, (q, k, v) in enumerate(layers):
        error, divergence, rows = 0.0, 0.0, range(49, 97)
        probed = [95 - i * 48 // 32 for i in range(32)]
        assert float(sums[number]["rows"]) == 64 and all(row + 1 in rows for row in probed)
        for row in probed:
            layer = (q[:, :, row : row + 1], k[:, :, : row + 1], v[:, :, : row + 1])
            p = (logits(*layer[:2]) * 16**-0.5).softmax(-1)
            sums_of_blocks = page_sums(p.mean(1), 8)
            sums_of_blocks[:, -1] = torch.inf
            mask = best(sums_of_blocks, 3).repeat_interleave(8, -1)[:, None, : row + 1].expand(-1, 6, -1)
            out, cut = dense(layer), over(layer, mask)
            error += float(((cut - out).flatten(1).norm(dim=1) / out.flatten(1).norm(dim=1)).sum())
            part = p * mask
            part = part / part.sum(-1, keepdim=True)
            divergence += float((part * (part / p).clamp(min=1e-300).log()).sum(-1).mean(1).sum())  # KL(p' || p)
        assert float(sums[number]["error"]) == pytest.approx(error)
        assert float(sums[number]["divergence"]) == pytest.approx(divergence)


def test_overlap_is_the_share_of_a_layer_s_blocks_that_an_earlier_one_chose() -> None:
    a, b = prompt_stack(2)
    sums = measured(TINY, [a, b, a])
    overlap = [(found["overlap"] / 64).tolist() for found in sums.values()]
    assert overlap[0] == [0, 0, 0] and overlap[1][1:] == [0, 0]
    # the same layer again chooses the same blocks; a layer that has nothing to do with it meets some by chance: 2 of 6 to 11
    assert overlap[2][0] == 1 and overlap[2][1] == overlap[1][0] and 0.1 < overlap[1][0] < 0.4


def test_layers_above_a_limit_are_full() -> None:
    def found(error: float, divergence: float) -> dict[str, Tensor]:
        facts = {"overlap": torch.ones(3), "error": error, "divergence": divergence, "rows": 1.0}
        return {name: torch.as_tensor(x) for name, x in facts.items()}

    method = HyLRA(max_error=0.5, max_divergence=0.3)
    for middle, roles in ((found(0.4, 0.2), [-2, 0, 0]), (found(0.6, 0.2), [-1, -2, 1]), (found(0.4, 0.4), [-1, -2, 1])):
        plan = method.conclude_all({0: found(0, 0), 1: middle, 2: found(0, 0)})
        assert [int(plan[layer]["role"]) for layer in range(3)] == roles
        assert float(plan[1]["error"]) == float(middle["error"])


def test_samples_that_say_nothing_are_refused() -> None:
    q, k, v = prompt_stack(1)[0]
    with pytest.raises(ValueError, match="samples of 96 tokens, which its budget of 2048 reads whole: give longer ones"):
        HyLRA().measure(stack_context(0, 1, q, k, v, {}, []), q, k, v)


# -- decoding -----------------------------------------------------------------------------------------------------------


def plan_of(sources: list[int]) -> Plan:
    roles = {i: s if s != i else ("select" if i in sources[i + 1 :] else "dense") for i, s in enumerate(sources)}
    tensors = {f"layer.{i}.{name}": x for i, found in planned_roles(roles).items() for name, x in found.items()}
    return Plan(slug="hylra", spec="hylra", fingerprint="", tensors=tensors, notes={})


def test_reuse_layers_read_the_blocks_of_their_source() -> None:
    layers = random_stack(6)
    steps = run_stack(TINY, layers, plan_of([0, 1, 1, 1, 4, 4]))
    for number, (layer, step) in enumerate(zip(layers, steps, strict=True)):
        if number in (0, 1, 4):
            assert worst(step.out, dense(layer)) < 1e-13 and step.pairs == 90
            assert (step.published is None) == (number == 0)
            continue
        q, k, _ = layers[1 if number < 4 else 4]
        sums = page_sums((logits(q, k) * 16**-0.5).softmax(-1).mean(1), 8)
        sums[:, -1] = torch.inf
        mask = best(sums, 3).repeat_interleave(8, -1)[:, None, :90].expand(-1, 6, -1)
        assert worst(step.out, over(layer, mask)) < 1e-13 and step.pairs == 24


@pytest.mark.parametrize("method", [HyLRA(budget=1.0, block=8), HyLRA(budget=90, block=8), TINY])
def test_opened_or_all_full_equals_dense_bit_for_bit(method: HyLRA) -> None:
    layers = random_stack(4)
    plan = plan_of([0, 1, 2, 3] if method is TINY else [0, 0, 0, 0])
    plain = run_stack(method, layers, plan_of([0, 1, 2, 3]))
    for step, want in zip(run_stack(method, layers, plan), plain, strict=True):
        assert torch.equal(step.out, want.out) and step.pairs == 90


# -- a prompt -----------------------------------------------------------------------------------------------------------


def in_a_prompt(method: HyLRA, layers: list[Layer], plan: Plan, last: int | None = None) -> list[tuple[Tensor, Any, list[Any]]]:
    shared: dict[str, Any] = {}
    ran = []
    for number, (q, k, v) in enumerate(layers):
        q = q if last is None else q[:, :, -last:]
        calls: list[Any] = []
        ctx = stack_context(number, len(layers), q, k, v, shared, [], plan=plan)
        ctx.phase = "prefill"
        ctx.attend = lambda q, k, v, s, calls=calls: calls.append(s) or saccade.ops.attend(q, k, v, s).out
        ran.append((method.attend(ctx, q, k, v), shared.get("selections", {}).get(number), calls))
    return ran


@pytest.mark.parametrize("last", [None, 37])
def test_in_a_prompt_tiles_of_queries_choose_together(last: int | None) -> None:
    layers = prompt_stack(3, n=93)
    ran = in_a_prompt(TINY, layers, plan_of([0, 0, 2]), last)
    (first, chosen, calls), (second, _, reused), (third, published, others) = ran
    assert calls == [None] and others == [None] and published is None and reused == [chosen]
    q, k, v = layers[0] if last is None else (layers[0][0][:, :, -last:], *layers[0][1:])
    assert worst(first, saccade.attention(q, k, v)) < 1e-12 and third.shape == first.shape
    tile, n_q = 3, q.shape[2]  # one tile by hand
    rows = range(tile * 8, tile * 8 + 8)
    p = torch.zeros(2, 12)
    for row in rows:
        seen = 93 - n_q + row + 1
        weights = (logits(q[:, :, row : row + 1], k[:, :, :seen]) * 16**-0.5).softmax(-1).mean(1)
        sums = page_sums(weights, 8)
        p[:, : sums.shape[1]] += sums
    tiles = {(93 - n_q + row) // 8 for row in rows}  # every row's own block is read
    for b in range(2):
        got = set((chosen.starts[b, 0, tile][: int(chosen.start_counts[b, 0, tile])] // 8).tolist())
        others_by_mass = [j for j in p[b].argsort(descending=True, stable=True).tolist() if j not in tiles]
        assert got == tiles | set(others_by_mass[: 3 - len(tiles)])
    q, k, v = layers[1] if last is None else (layers[1][0][:, :, -last:], *layers[1][1:])
    assert chosen.heads == 1 and worst(second, saccade.ops.attend(q, k, v, chosen).out) < 1e-12


def test_an_opened_prompt_equals_dense() -> None:
    layers = prompt_stack(2)
    for budget in (1.0, 96):
        for (out, _, _), layer in zip(in_a_prompt(HyLRA(budget=budget, block=8), layers, plan_of([0, 0])), layers, strict=True):
            assert torch.equal(out, saccade.attention(*layer))


# -- the pocket model ---------------------------------------------------------------------------------------------------

SPEC = "hylra(budget=0.25, block=16, recent=4, theta=0.5)"


@cache
def calibrated() -> Plan:
    text = grammar()
    return saccade.calibrate(pocket(), SPEC, [ids_of(text.haystack(Random(seed), 2047)) for seed in range(2)])


def full_layers(plan: Plan) -> int:
    return sum(int(plan.tensor(layer, "role")) < 0 for layer in range(8))


@pytest.mark.slow
def test_the_pocket_model_finds_a_needle() -> None:
    prompt, plan = needle(), calibrated()
    text, stats = answer(prompt, SPEC, plan)
    assert text == prompt.answer
    for layer in stats.per_layer:
        reuses = int(plan.tensor(layer["layer"], "role")) >= 0
        assert 0.24 < layer["decode_density"] <= 0.26 if reuses else layer["decode_density"] == 1
    assert full_layers(plan) == 2


@pytest.mark.slow
def test_full_layers_grow_with_theta() -> None:
    method, plan = build(SPEC), calibrated()
    assert isinstance(method, HyLRA)
    sums = {
        layer: {**{name: plan.tensor(layer, name) for name in ("overlap", "error", "divergence")}, "rows": torch.tensor(1.0)}
        for layer in range(8)
    }
    counts = []
    for theta in (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 1.01):
        roles = HyLRA(theta=theta, max_error=1e9, max_divergence=1e9).conclude_all(sums)
        counts.append(sum(int(found["role"]) < 0 for found in roles.values()))
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 8 and len(set(counts)) > 3


@pytest.mark.slow
def test_overlap_at_run_time_is_no_better_than_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuse changes what later layers are given, so chains drift: measured on the prompt that the plan was made from."""
    prompt = needle()
    plan = saccade.calibrate(pocket(), SPEC, [prompt.ids])
    seen: dict[int, list[float]] = {}
    attend = HyLRA.attend

    def recording(self: HyLRA, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, role = attend(self, ctx, q, k, v), self.role(ctx)
        if isinstance(role, int):
            own, read = (listed(s, 1)[0, 0, : -4 * 16] for s in (self.choose(ctx, step_logits(ctx, q, k)), ctx.published(role)))
            seen.setdefault(ctx.layer, []).append(float((own & read).sum() / own.sum()))
        return out

    monkeypatch.setattr(HyLRA, "attend", recording)
    answer(prompt, SPEC, plan)
    offline = [float(plan.tensor(layer, "overlap")[int(plan.tensor(layer, "role"))]) for layer in seen]
    online = [sum(x) / len(x) for x in seen.values()]
    assert len(seen) >= 3 and sum(online) / len(online) <= sum(offline) / len(offline), (online, offline)


@pytest.mark.slow
def test_a_prompt_read_by_hylra_keeps_the_needle() -> None:
    prompt, plan = needle(), calibrated()
    with saccade.attach(pocket(), prefill=SPEC, decode=SPEC, plan=plan) as handle, torch.no_grad():
        out = pocket().generate(prompt.ids, max_new_tokens=len(prompt.answer), do_sample=False)
        layers = handle.stats().per_layer
    assert bytes(b - 3 for b in out[0, prompt.ids.shape[1] :].tolist()).decode() == prompt.answer
    for layer in layers:
        role = int(plan.tensor(layer["layer"], "role"))
        # a planner's two more passes over the scores, without values, are counted
        assert 0.22 < layer["prefill_density"] < 0.28 if role >= 0 else layer["prefill_density"] == pytest.approx(2 if role == -2 else 1)


# -- fields -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": 0}, "block=0: expected a whole number of at least 1"),
        ({"recent": 1.0}, "recent=1.0"),
        ({"theta": -0.1}, "theta=-0.1: expected a number of at least 0"),
        ({"max_error": float("nan")}, "max_error=nan"),
        ({"budget": Mass(0.9)}, "reads a fixed number of blocks"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HyLRA(**fields)


def test_without_a_plan_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="hylra needs a calibration plan"):
        saccade.attach(pocket(), decode="hylra")


def test_spec_round_trip() -> None:
    spec = "hylra(budget=0.1, block=64, recent=2, theta=0.7, max_error=0.2, max_divergence=0.1)"
    assert build(spec).spec == spec
