"""spatten: what is pruned, that it stays pruned, and when the low bits are fetched."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.contract.harness import greedy, llama, tokens
from tests.methods.decode.harness import needle, pocket
from tests.methods.decode.stack import worst
from torch import Tensor

import saccade
from saccade.attach.calls import attention_calls
from saccade.attach.stats import Stats
from saccade.core import HeadLayout, LayerContext
from saccade.methods import build
from saccade.methods.decode.spatten import CASCADE, FETCHES, SpAtten
from saccade.parts.cascade import Cascade, count_of, surviving_share
from saccade.parts.progressive import split_bits

LAYERS, N = 6, 90
PRUNING: dict[str, Any] = {
    "token_ratios": (0.2, 0.3), "head_ratios": (0.0, 0.0), "spared": 0.0, "spared_heads": 0.0, "sinks": 2, "recent": 4,
}  # fmt: skip


class Stack:
    """Layers of 6 query heads on 2 key heads without a model: a prompt, then steps."""

    def __init__(self, method: SpAtten, planted: int | None = None, total: int = N + 8) -> None:
        g = torch.Generator().manual_seed(0)
        shapes = [(2, heads, total, 16) for heads in (6, 2, 2)]
        self.layers = [[torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes] for _ in range(LAYERS)]
        if planted is not None:
            for q, k, _ in self.layers:
                q += 1.0
                k[:, :, planted] = 2.0
        self.method, self.sequence, self.pairs = method, {}, []

    def run(self, begin: int, end: int) -> list[Tensor]:
        """The outputs of all layers for the tokens from begin to end."""
        outs, shared = [], {}
        phase = "decode" if begin else "prefill"
        for number, (q, k, v) in enumerate(self.layers):
            part = (q[:, :, begin:end], k[:, :, :end], v[:, :, :end])
            call = attention_calls(phase, scale=0.25, softcap=None, impl="auto")
            ctx = LayerContext(
                layer=number, layers=LAYERS, layout=HeadLayout.of(*part), scale=0.25, seen=end, phase=phase, shared=shared,
                sequence=self.sequence, count=self.pairs.append,
                attend=lambda *given, call=call, **options: call(*given, return_lse=False, **options).out,
            )  # fmt: skip
            outs.append(self.method.attend(ctx, *part))
        return outs

    def read(self, layer: int) -> Tensor:
        return self.sequence[CASCADE].last >= layer


def naive(stack: Stack, method: SpAtten) -> tuple[list[Tensor], list[Tensor]]:
    """The card's cascade on the prompt with whole maps: outputs and the tokens that each layer reads, of batch row 0."""
    alive, heads = torch.ones(N, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    mass, head_mass = torch.zeros(N, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    outs, read = [], []
    for number, (q, k, v) in enumerate(stack.layers):
        q, k, v = (x[0, :, :N].repeat_interleave(6 // x.shape[1], 0) for x in (q, k, v))
        visible = torch.ones(N, N).tril().bool() & alive
        weights = torch.where(visible, (q @ k.mT) / 4, -torch.inf).softmax(-1).nan_to_num() * alive[:, None] * heads[:, None, None]
        out = weights @ v
        outs.append(out)
        read.append(alive.clone())
        mass, head_mass = mass + weights.sum((0, 1)), head_mass + out.abs().sum((1, 2))
        if number + 1 < LAYERS:
            share = surviving_share(number + 1, LAYERS, method.token_ratios, method.spared)
            scores = mass.clone()
            scores[: method.sinks] = scores[N - method.recent :] = torch.inf
            scores[~alive] = -torch.inf
            alive = torch.zeros(N, dtype=torch.bool).index_fill(0, scores.argsort(descending=True, stable=True)[: count_of(share, N)], True)
            kept = count_of(surviving_share(number + 1, LAYERS, method.head_ratios, method.spared_heads), 6)
            ranked = head_mass.masked_fill(~heads, -1).argsort(descending=True, stable=True)
            heads = torch.zeros(6, dtype=torch.bool).index_fill(0, ranked[:kept], True)
    return outs, read


# -- the cascade --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_ratios", [(0.0, 0.0), (0.1, 0.2)])
def test_a_prompt_is_pruned_by_what_was_received_in_all_layers_so_far(head_ratios: tuple[float, float]) -> None:
    method = SpAtten(**{**PRUNING, "head_ratios": head_ratios})
    stack = Stack(method)
    outs = stack.run(0, N)
    wanted, read = naive(stack, method)
    for layer in range(LAYERS):
        assert torch.equal(stack.read(layer)[0], read[layer])
        assert worst(outs[layer][0], wanted[layer]) < 1e-12
    assert int(read[-1].sum()) == count_of(0.8 * 0.775 * 0.75 * 0.725 * 0.7, N)
    assert sum(stack.pairs) < 0.5 * LAYERS * N * (N + 1) / 2


def test_a_pruned_head_gives_nothing_from_then_on() -> None:
    stack = Stack(SpAtten(**{**PRUNING, "head_ratios": (0.3, 0.3)}))
    prompt, *steps = [stack.run(0, N), *[stack.run(N + i, N + i + 1) for i in range(3)]]
    silent = [[bool((out[0, head] == 0).all()) for head in range(6)] for out in prompt]
    assert [sum(layer) for layer in silent] == [0, 1, 3, 3, 4, 4]  # 6 heads times 0.7, 0.49, 0.34, 0.24, 0.17, rounded up
    for before, after in pairwise(silent):
        assert all(b or not a for a, b in zip(before, after, strict=True))
    for step in steps:
        for layer, out in enumerate(step):
            assert all(not gone or not bool(out[0, head].any()) for head, gone in enumerate(silent[layer]))


def test_what_layers_read_is_nested_and_a_planted_token_survives() -> None:
    stack = Stack(SpAtten(**PRUNING), planted=30)
    stack.run(0, N)
    before = torch.stack([stack.read(layer) for layer in range(LAYERS)])
    for i in range(6):
        stack.run(N + i, N + i + 1)
        now = torch.stack([stack.read(layer) for layer in range(LAYERS)])
        assert not bool((now[1:] & ~now[:-1]).any()), "nested over layers"
        assert not bool((now[:, :, :-1] & ~before).any()), "what has gone stays away"
        assert bool(now[..., 30].all()) and bool(now[..., :2].all()) and bool(now[..., -4:].all())
        for layer in range(1, LAYERS):
            # the newest token comes before the next step prunes
            assert int(now[layer].sum(-1).amax()) <= count_of(surviving_share(layer, LAYERS, (0.2, 0.3), 0.0), N + i + 1)
        before = now
    assert int(before[-1, 0].sum()) < 30


def test_steps_taken_back_leave_no_trace() -> None:
    stack = Stack(SpAtten(**PRUNING))
    stack.run(0, N)
    first = [stack.run(N + i, N + i + 1) for i in range(6)]
    stack.sequence[CASCADE].rewind(N + 2)
    again = [stack.run(N + i, N + i + 1) for i in range(2, 6)]
    for a, b in zip(first[2:], again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_guesses_at_a_prompts_end_are_cut_off_and_old_steps_as_far_as_known() -> None:
    cascade = Cascade(1, 2, 0, torch.float64, torch.device("cpu"))
    cascade.arrive(0, 10, 10)
    cascade.arrive(0, 8, 1)  # 3 of the 10 were guesses
    assert cascade.mass.shape == (1, 8)
    for n in range(9, 100):
        cascade.arrive(0, n, 1)
    cascade.mass[:] = 1
    cascade.rewind(20)
    assert cascade.mass.tolist() == [[1.0] * 20], "further back than is remembered: cut, not restored"
    cascade.arrive(0, 21, 1)
    cascade.mass[:] = 5
    cascade.rewind(20)
    assert cascade.mass.tolist() == [[1.0] * 20]


def test_schedule() -> None:
    """The first 15% of 32 layers are spared, then ratios go from start to end, their mean half way."""
    ratios = (0.05, 0.25)
    assert [surviving_share(layer, 32, ratios, 0.15) for layer in range(5)] == [1.0] * 5
    assert surviving_share(5, 32, ratios, 0.15) == pytest.approx(0.95)
    step = [surviving_share(layer, 32, ratios, 0.15) / surviving_share(layer - 1, 32, ratios, 0.15) for layer in range(5, 32)]
    assert 1 - sum(step) / len(step) == pytest.approx(0.15) and step[-1] == pytest.approx(0.75)
    assert surviving_share(0, 4, ratios, 0.0) == 1.0, "the first layer has nothing to go by"


# -- values and bits ----------------------------------------------------------------------------------------------------


def inputs(n: int = 40, m: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, heads, length, 16, generator=g, dtype=torch.float64) for heads, length in ((6, m), (2, n), (2, n)))
    return q, k, v


def open_method(**fields: Any) -> SpAtten:
    return SpAtten(**{"token_ratios": (0.0, 0.0), "head_ratios": (0.0, 0.0), **fields})


def test_only_the_largest_probabilities_fetch_their_value() -> None:
    q, k, v = inputs()
    out = saccade.attention(q, k, v, method=open_method(value_ratio=0.75))
    weights = ((q.unflatten(1, (2, 3)) @ k[:, :, None].mT) / 4).masked_fill(torch.ones(12, 40).triu(29).bool(), -torch.inf).softmax(-1)
    for row in range(12):
        count = -(-(29 + row) // 4)
        border = weights[..., row, :].sort(descending=True).values[..., count - 1 : count]
        kept = weights[..., row, :] * (weights[..., row, :] >= border)
        assert worst(out[:, :, row], (kept.unsqueeze(3) @ v[:, :, None]).squeeze(3).flatten(1, 2)) < 1e-12
    # not renormalised, not passed on
    assert float(saccade.attention(q, k, torch.ones_like(v), method=open_method(value_ratio=0.75)).max()) < 1


@pytest.mark.parametrize(("threshold", "part"), [(0.0, 0), (1.01, 1)])
def test_threshold_0_is_the_high_bits_and_above_1_all_bits(threshold: float, part: int) -> None:
    q, k, v = inputs()
    used, keys = (split_bits(x, 6, 4)[part] for x in (q, k))
    wanted = saccade.attention(used, keys, v)
    assert worst(saccade.attention(q, k, v, method=open_method(bits=(6, 4), threshold=threshold)), wanted) < 1e-12
    all_bits = [saccade.attention(q, k, v, method=open_method(bits=bits, threshold=1.01)) for bits in ((4, 2), (6, 4), (12, 4))]
    errors = [worst(out, saccade.attention(q, k, v)) for out in all_bits]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def test_a_peaked_row_never_fetches_low_bits_and_a_uniform_row_always() -> None:
    q, k, v = inputs(n=60, m=2)
    layer = Stack(open_method(bits=(6, 4)), total=60)
    for scale, fetched in ((8.0, 0), (0.0, 12)):
        k[:, :, 20] = scale * q[:, ::3].mean(2)
        asked = q[:, ::3].repeat_interleave(3, 1).mean(2, keepdim=True).expand(-1, -1, 60, -1)
        layer.layers, layer.sequence = [[asked * (scale > 0), k, v]], {}
        layer.run(58, 60)
        assert layer.sequence[FETCHES].tolist() == [[12, fetched]] * 2


def test_work_counts_bits_and_values_by_halves() -> None:
    q, k, v = inputs(n=40, m=1)
    quantised = {"bits": (8, 4)}
    cases = [({"value_ratio": 0.75}, 0.625), ({**quantised, "threshold": 0}, 0.5 * 8 / 12 + 0.5), ({**quantised, "threshold": 2}, 1.0)]
    for fields, share in cases:
        stack = Stack(open_method(**fields), total=40)
        stack.layers = [[q.expand(-1, -1, 40, -1), k, v]]
        stack.run(39, 40)
        assert sum(stack.pairs) == pytest.approx(40 * share)


# -- models -------------------------------------------------------------------------------------------------------------


def test_without_a_cache_layers_of_one_pass_share_what_they_know() -> None:
    model, ids = llama(), tokens(1, 60)
    spec = "spatten(token_ratios=(0.5, 0.5), spared=0.0, recent=4, sinks=2)"
    with saccade.attach(model, prefill=spec), torch.no_grad():
        with_cache, without = (model(ids, use_cache=use).logits[:, -1] for use in (True, False))
    assert worst(with_cache, without) < 1e-9
    with saccade.attach(model, prefill=spec):
        assert greedy(model, ids, 4, use_cache=False).shape == (1, 64)


def found(method: SpAtten) -> tuple[str, Stats]:
    prompt = needle(1024)
    with saccade.attach(pocket(), prefill=method) as handle, torch.no_grad():
        out = pocket().generate(prompt.ids, max_new_tokens=len(prompt.answer), do_sample=False)
        stats = handle.stats()
    return bytes(b - 3 for b in out[0, prompt.ids.shape[1] :].tolist() if b >= 3).decode(errors="replace"), stats


@pytest.mark.slow
def test_the_pocket_model_finds_a_needle() -> None:
    """It retrieves in layers 4 and 5: pruning behind them, and rows in which most fetch 8 of 12 bits, lose nothing."""
    text, stats = found(SpAtten(token_ratios=(0.2, 0.3), spared=0.7, bits=(8, 4), threshold=0.3))
    assert text == needle(1024).answer
    assert stats.prefill_density is not None and stats.decode_density is not None
    shares = [layer["decode_density"] for layer in stats.per_layer]
    assert 0.5 < shares[7] < shares[6] - 0.1
    assert max(shares) < 0.95 and stats.prefill_density < 0.8


# -- fields -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ratios": (0.1, 1.0)}, r"token_ratios=\(0.1, 1.0\)\): expected two ratios in \[0, 1\)"),
        ({"head_ratios": 0.1}, "head_ratios=0.1"),
        ({"value_ratio": 1}, "value_ratio=1"),
        ({"spared": 1.5}, "spared=1.5"),
        ({"recent": 0}, "recent=0"),
        ({"sinks": True}, "sinks=True"),
        ({"bits": (1, 4)}, "expected .MSB, LSB. with at least 2 high bits"),
        ({"threshold": -1}, "threshold=-1"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpAtten(**fields)


def test_spec_round_trip_and_no_other_policy() -> None:
    spec = "spatten(token_ratios=(0.1, 0.2), bits=(6, 4))"
    assert build(spec).spec == spec
    with pytest.raises(ValueError, match="spatten acts on the cache phase too"):
        saccade.attach(llama(), prefill=spec, cache="snapkv")
