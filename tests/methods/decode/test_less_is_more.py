"""less-is-more: one set of exactly K tokens for all heads and layers, and why it finds what single heads miss."""

from __future__ import annotations

import pytest
import torch
from tests.methods.decode.harness import answer, logits, needle
from tests.methods.decode.stack import dense, listed, over, random_stack, run_stack, worst
from torch import Tensor

from saccade.core import Mass
from saccade.methods import build
from saccade.methods.decode.less_is_more import LessIsMore
from saccade.methods.decode.tidaldecode import TidalDecode


def by_hand(scores: Tensor, sinks: int, chosen: int, recent: int) -> list[int]:
    """The card's steps 3 to 5 for one row, scores `(Hq, n)`."""
    n = scores.shape[1]
    order = [sorted(range(sinks, n - recent), key=lambda j, row=row: (-float(row[j]), j)) for row in scores]
    named: list[int] = []
    for rank in range(chosen):
        for head in order:
            if head[rank] not in named:
                named.append(head[rank])
    return sorted([*range(sinks), *named[:chosen], *range(n - recent, n)])


# -- the set ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"budget": 24}, (4, 18, 2)),
        ({"budget": 24, "rho": 0.5}, (4, 12, 8)),
        ({"budget": 12}, (0, 9, 3)),  # a recent part smaller than the sinks has none of them
        ({"budget": 16}, (4, 12, 0)),
        ({"budget": 1}, (0, 0, 1)),
        ({"budget": 10, "rho": 1}, (0, 10, 0)),
        ({"budget": 0.25, "sinks": 0}, (0, 17, 6)),
    ],
)
def test_sinks_chosen_and_recent_make_up_the_budget(fields: dict[str, float], parts: tuple[int, int, int]) -> None:
    method = LessIsMore(start=0, correction=None, **fields)
    assert method.parts(90) == parts
    layers = random_stack(3, batch=3)
    chosen = run_stack(method, layers)[0].published
    assert chosen is not None and chosen.heads == 1 and chosen.token_counts.unique().tolist() == [sum(parts)]
    for row in range(3):  # rows of a batch each have their own set
        assert chosen.tokens[row, 0, 0].tolist() == by_hand(logits(layers[0][0], layers[0][1])[row], *parts)


def test_every_head_of_every_following_layer_reads_the_same_keys() -> None:
    layers = random_stack(7)
    steps = run_stack(LessIsMore(budget=24, start=1, correction=4), layers)
    for number, (layer, step) in enumerate(zip(layers, steps, strict=True)):
        if number in (0, 1, 4):
            assert worst(step.out, dense(layer)) < 1e-13 and step.pairs == 90
        else:
            source = steps[1 if number < 4 else 4].published
            assert source is not None and step.pairs == 24 and step.published is None
            assert worst(step.out, over(layer, listed(source, 6))) < 1e-13


@pytest.mark.parametrize("budget", [1.0, 90, 91])
def test_a_budget_for_all_equals_dense_bit_for_bit(budget: float | int) -> None:
    layers = random_stack(5)
    plain = run_stack(LessIsMore(start=100), layers)
    for step, want in zip(run_stack(LessIsMore(budget=budget, start=1), layers), plain, strict=True):
        assert torch.equal(step.out, want.out)


def test_the_set_is_made_anew_at_every_step() -> None:
    layers = random_stack(2)
    other = [(-q, k, v) for q, k, v in layers]
    method = LessIsMore(budget=24, start=0, correction=None)
    a, b = (run_stack(method, x)[0].published for x in (layers, other))
    assert a is not None and b is not None and not torch.equal(a.tokens, b.tokens)


# -- why it works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", [1.0, 2.0])
def test_the_unified_set_recalls_more_of_what_heads_share(signal: float) -> None:
    """Eight heads, 32 of 400 tokens matter to all of them, every head sees them through noise of its own."""
    g = torch.Generator().manual_seed(int(signal))
    unified, single = [], []
    for _ in range(20):
        planted = torch.randperm(400, generator=g)[:32]
        scores = torch.randn(1, 8, 400, generator=g, dtype=torch.float64)
        scores[:, :, planted] += signal
        true = torch.zeros(400, dtype=torch.bool).index_fill(0, planted, True)
        # queries of unit vectors read their own column of the keys: any map of logits can be made
        q, k = torch.eye(8, dtype=torch.float64)[None, :, None] * 8**0.5, scores.mT.unsqueeze(1)
        method = LessIsMore(budget=32, rho=1.0, start=0, correction=None)
        published = run_stack(method, [(q, k, k), (q, k, k)])[0].published
        assert published is not None
        unified.append(float(listed(published, 1)[0, 0][true].sum()) / 32)
        single.append(float(true[scores[0].topk(32).indices].sum()) / 8 / 32)
    a, b = sum(unified) / 20, sum(single) / 20
    low, high = ((0.35, 0.5), (0.7, 0.9))[int(signal) - 1]
    assert low < a < high and a > b + 0.1, (a, b)


# -- the pocket model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"start": 0, "correction": 4}, {}])
def test_the_pocket_model_finds_a_needle(fields: dict[str, int]) -> None:
    prompt = needle()
    text, stats = answer(prompt, LessIsMore(budget=0.25, **fields))
    assert text == prompt.answer
    full = (0, 4) if fields else (0, 1, 2, 3)
    for layer in stats.per_layer:
        assert layer["decode_density"] == 1 if layer["layer"] in full else 0.24 < layer["decode_density"] < 0.26


def test_heads_that_agree_keep_what_matching_head_numbers_lose() -> None:
    """The same planners and budget: positions passed by head number lose this needle, positions that all heads share find it."""
    prompt = needle()
    assert answer(prompt, TidalDecode(budget=0.25, start=2, correction=3))[0] != prompt.answer
    assert answer(prompt, LessIsMore(budget=0.25, start=2, correction=3))[0] == prompt.answer


def test_random_tokens_of_the_same_number_lose_the_needle(monkeypatch: pytest.MonkeyPatch) -> None:
    import saccade.methods.decode.less_is_more as module

    g = torch.Generator().manual_seed(0)
    monkeypatch.setattr(module, "interleave_ranks", lambda scores, _: torch.rand(1, 1, scores.shape[-1], generator=g))
    prompt = needle()
    assert answer(prompt, LessIsMore(budget=0.25, start=0, correction=4))[0] != prompt.answer


# -- fields -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": -1}, "start=-1: expected a whole number of at least 0"),
        ({"sinks": 1.5}, "sinks=1.5"),
        ({"rho": 1.5}, r"rho=1.5: expected the share of the budget that is chosen, in \[0, 1\]"),
        ({"rho": True}, "rho=True"),
        ({"correction": 1.0}, "correction=1.0"),
        ({"budget": Mass(0.9)}, "less-is-more reads a fixed number of tokens"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LessIsMore(**fields)


def test_spec_round_trip() -> None:
    spec = "less-is-more(budget=1024, rho=0.5, sinks=8, start=1, correction=20)"
    assert build(spec).spec == spec
