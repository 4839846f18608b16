"""Maps, scores and masses of `saccade inspect`, against what they stand for computed in one piece."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.cases import make_one_list
from tests.evaluate.conftest import Near
from tests.evaluate.tiny import tiny
from torch import Tensor

from saccade.attach.capture import capture
from saccade.core import REGISTRY, Plan, Selection
from saccade.evaluate import head_scores, kept, maps
from saccade.evaluate.inspect import check_prefill, inspect, needle_prompt, save, tile_for
from saccade.evaluate.replay import probabilities


def inputs(n: int, heads: int = 4, kv_heads: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, n, 16, generator=generator, dtype=dtype)
    return 2 * q, torch.randn(1, kv_heads, n, 16, generator=generator, dtype=dtype)


def exact(q: Tensor, k: Tensor, softcap: float | None = None) -> Tensor:
    """The whole map, `(Hq, N, N)` float64, from plain torch."""
    group = q.shape[1] // k.shape[1]
    logits = q[0].double() @ k[0].double().repeat_interleave(group, 0).mT * 0.25
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    n = q.shape[2]
    return logits.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def pooled(x: Tensor, rows: int, columns: int) -> Tensor:
    n = x.shape[-1]
    x = torch.nn.functional.pad(x, (0, -n % columns, 0, -n % rows))
    return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).sum((-1, -3))


def within(found: Tensor, truth: Tensor, plain: Tensor) -> None:
    """At most twice as far from the float64 truth as plain float32 code is, plus 1e-6."""
    assert (found.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1e-6


@pytest.mark.parametrize(("n", "rows", "columns", "pairs"), [(64, 8, 8, 1 << 24), (61, 8, 4, 1), (50, 16, 16, 3000), (40, 1, 1, 500)])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_tile_sums_are_the_exact_map_pooled(
    n: int, rows: int, columns: int, pairs: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "PAIRS", pairs)
    monkeypatch.setattr(maps, "ROWS", 1 if pairs < 4000 else maps.ROWS)
    q, k = inputs(n)
    told: list[float] = []
    sums, lse = maps.tile_sums(q, k, rows, columns, scale=0.25, softcap=softcap, progress=told.append)
    whole = exact(q, k, softcap)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, pooled(whole, rows, columns), rtol=0, atol=1e-12)
    logits = q[0] @ k[0].repeat_interleave(2, 0).mT * 0.25
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    diagonal = whole.diagonal(dim1=1, dim2=2).log() + lse
    torch.testing.assert_close(diagonal, logits.diagonal(dim1=1, dim2=2), rtol=0, atol=1e-12)
    values = torch.randn(1, 2, n, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    again = maps.whole(q, k, values, rows, columns, scale=0.25, softcap=softcap)
    assert torch.equal(again.sums, sums) and again.out is not None
    torch.testing.assert_close(again.out[0], whole @ values[0].repeat_interleave(2, 0), rtol=0, atol=1e-12)
    assert told == sorted(told) and told[-1] == 1.0 and (len(told) > 1) == (pairs < 4000)
    torch.testing.assert_close(maps.pool_sums(sums, 2, 4), pooled(whole, 2 * rows, 4 * columns), rtol=0, atol=1e-12)


def test_float32_is_as_near_as_plain_code() -> None:
    q, k = inputs(96, dtype=torch.float32)
    sums, _ = maps.tile_sums(q, k, 8, 8, scale=0.25)
    within(sums, pooled(exact(q, k), 8, 8), pooled(probabilities(q, k, 0, 0.25, None), 8, 8))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_way_of_a_gpu_gives_the_same(softcap: float | None) -> None:
    q, k = inputs(61)
    ours, ours_lse = maps.tile_sums(q, k, 8, 16, scale=0.25, softcap=softcap)
    theirs, theirs_lse = maps.by_kernels(q, k, 8, 16, scale=0.25, softcap=softcap)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-10)
    torch.testing.assert_close(theirs_lse, ours_lse, rtol=0, atol=1e-10)


def test_large_logits_do_not_overflow() -> None:
    q, k = inputs(32, dtype=torch.float32)
    sums, lse = maps.tile_sums(200 * q, k, 8, 8, scale=0.25)
    assert sums.isfinite().all() and lse.isfinite().all()
    torch.testing.assert_close(sums.sum((1, 2)), torch.full((4,), 32.0))


def random_selection(n: int, block_q: int, block_k: int, *, whole: bool, heads: int = 4, seed: int = 1) -> Selection:
    generator = torch.Generator().manual_seed(seed)
    if whole:
        mask = torch.rand(1, heads, math.ceil(n / block_q), math.ceil(n / block_k), generator=generator) < 0.4
        return Selection.from_block_mask(mask, block_q=block_q, block_k=block_k, n_q=n, n_k=n)
    mask = torch.rand(1, heads, math.ceil(n / block_q), n, generator=generator) < 0.4
    return Selection.from_token_mask(mask, block_q=block_q, n_q=n)


@pytest.mark.parametrize(("n", "block_q", "tile"), [(37, 4, 8), (64, 16, 8), (50, 8, 3), (40, 1, 4), (33, 7, 16)])
@pytest.mark.parametrize("held", [1, 1 << 24])
def test_kept_shares_are_the_dense_mask_pooled(n: int, block_q: int, tile: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LISTED", held)
    selection = random_selection(n, block_q, 1, whole=False, heads=2)
    visible = pooled(torch.ones(n, n).tril(), tile, tile)
    expected = pooled(selection.dense_mask()[0].float(), tile, tile) / visible.clamp(min=1)
    torch.testing.assert_close(kept.kept_shares(selection, tile), expected, rtol=0, atol=1e-6)


def test_one_token_list_for_all_tiles_is_drawn_and_weighed_as_written_lists_are() -> None:
    both = make_one_list(n_q=40, n_k=40, causal=True, block_q=4, block_k=8, batch=1, heads=2, weighted=False, seed=2)
    assert bool(both.shared.token_counts.any())
    assert torch.equal(kept.kept_shares(both.shared, 8), kept.kept_shares(both.written, 8))
    q, k = inputs(40)
    rows = kept.sampled_rows(40, 30)
    a, b = (kept.mass_of_rows(s, q, k, rows, scale=0.25) for s in (both.shared, both.written))
    assert torch.equal(a, b)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("n", "block_q", "block_k", "tile"), [(64, 16, 8, 4), (61, 8, 16, 8), (50, 4, 8, 16)])
def test_mass_of_whole_tiles_is_exact(n: int, block_q: int, block_k: int, tile: int, heads: int) -> None:
    q, k = inputs(n)
    selection = random_selection(n, block_q, block_k, whole=True, heads=heads)
    fine = kept.whole_tiles(selection, tile, 4)
    assert fine is not None and block_q % fine[0] == tile % fine[0] == 0 and block_k % fine[1] == tile % fine[1] == 0
    sums, _ = maps.tile_sums(q, k, *fine, scale=0.25)
    found = kept.mass_of_tiles(selection, sums, *fine)
    mask = selection.dense_mask()[0].repeat_interleave(4 // heads, 0)
    torch.testing.assert_close(found, (exact(q, k) * mask).sum((1, 2)) / n, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.float(), selection.mass(q, k, 0.25)[0], rtol=0, atol=1e-5)


def test_single_keys_and_unaligned_tiles_have_no_tile_sums() -> None:
    assert kept.whole_tiles(random_selection(40, 4, 1, whole=False), 8, 4) is None
    starts = torch.tensor([[[[3]], [[11]]]], dtype=torch.int32).transpose(1, 2).reshape(1, 1, 2, 1)
    loose = Selection.from_parts(n_q=32, n_k=32, block_q=16, block_k=8, starts=starts)
    assert not loose.aligned and kept.whole_tiles(loose, 8, 1) is None


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_mass_of_rows_is_exact_with_all_and_near_with_some(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "ROWS", 7)
    q, k = inputs(120)
    selection = random_selection(120, 8, 1, whole=False, heads=heads)
    mask = selection.dense_mask()[0].repeat_interleave(4 // heads, 0)
    by_row = (exact(q, k) * mask).sum(-1)
    found = kept.mass_of_rows(selection, q, k, kept.sampled_rows(120, 500), scale=0.25)
    torch.testing.assert_close(found.double(), by_row.mean(-1), rtol=0, atol=1e-6)
    some = kept.sampled_rows(120, 30, seed=3)
    assert some.shape == (30,) and (some.diff() > 0).all() and torch.equal(some // 4, torch.arange(30))
    found = kept.mass_of_rows(selection, q, k, some, scale=0.25)
    torch.testing.assert_close(found.double(), by_row[:, some].mean(-1), rtol=0, atol=1e-6)
    assert not torch.equal(some, kept.sampled_rows(120, 30, seed=4)) and torch.equal(some, kept.sampled_rows(120, 30, seed=3))


def test_repeats_pair_a_second_occurrence_with_what_followed_the_first() -> None:
    #      0  1  2  3  4  5  6  7  8  9 10 11 12
    ids = [1, 2, 3, 9, 5, 1, 2, 3, 8, 1, 2, 3, 7]
    queries, keys = head_scores.repeats(ids, ngram=3)
    assert (queries.tolist(), keys.tolist()) == ([7], [3]), "the third occurrence at 11 does not count"
    assert head_scores.repeats([4] * 9, ngram=3)[0].numel() == 0, "a run of one token overlaps itself"
    assert head_scores.repeats(list(range(20)), ngram=3)[0].shape == (0,)


def test_at_most_so_many_repeats_evenly_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_scores, "MOST_REPEATS", 10)
    queries, keys = head_scores.repeats([*range(60), *range(60)], ngram=4)
    assert queries.shape == (10,) and torch.equal(queries - keys, torch.full((10,), 59)) and queries.diff().unique().numel() <= 2


def one_hot_keys(places: Tensor, n: int, strength: float = 40.0) -> tuple[Tensor, Tensor]:
    """q, k `(1, 1, n, n)` of a head whose query i attends to key `places[i]` alone."""
    q = strength * torch.eye(n)[places]
    return q[None, None], torch.eye(n)[None, None]


def test_a_sink_head_and_an_induction_head_are_told_apart() -> None:
    n, period = 64, 16
    ids = [*range(period)] * (n // period)
    pairs = head_scores.repeats(ids, ngram=4)
    here = torch.arange(n)
    # what followed this token one period ago; the first period has no past and looks at itself
    induction = torch.where(here >= period, here - period + 1, here)
    heads = {"sink": torch.zeros(n, dtype=torch.long), "induction": induction, "local": (here - 1).clamp(min=0)}
    q, k = (torch.cat(parts, 1) for parts in zip(*(one_hot_keys(places, n) for places in heads.values()), strict=True))
    _, lse = maps.tile_sums(q, k, 8, 8, scale=1.0)
    sink = head_scores.sink_scores(q, k, lse, scale=1.0)
    retrieval = head_scores.retrieval_scores(q, k, lse, pairs, scale=1.0)
    assert retrieval is not None
    torch.testing.assert_close(retrieval, torch.tensor([0.0, 1.0, 0.0]), rtol=0, atol=1e-5)
    # the induction head meets the first four tokens in 3 of 60 queries, the local head in one
    torch.testing.assert_close(sink, torch.tensor([1.0, 3 / 60, 1 / 60]), rtol=0, atol=1e-5)


def test_scores_are_those_of_the_exact_map() -> None:
    q, k = inputs(80)
    whole = exact(q, k, 3.0)
    _, lse = maps.tile_sums(q, k, 8, 8, scale=0.25, softcap=3.0)
    pairs = (torch.tensor([20, 50, 79]), torch.tensor([3, 4, 60]))
    found = head_scores.retrieval_scores(q, k, lse, pairs, scale=0.25, softcap=3.0)
    assert found is not None
    torch.testing.assert_close(found, whole[:, pairs[0], pairs[1]].mean(-1), rtol=0, atol=1e-12)
    sink = head_scores.sink_scores(q, k, lse, scale=0.25, softcap=3.0)
    torch.testing.assert_close(sink, whole[:, 4:, :4].sum(-1).mean(-1), rtol=0, atol=1e-12)
    assert head_scores.retrieval_scores(q, k, lse, (pairs[0][:0], pairs[1][:0]), scale=0.25) is None


@pytest.mark.parametrize(
    ("n", "heads", "tile"), [(100, 48, 1), (256, 48, 1), (257, 48, 2), (32768, 48, 128), (32768, 1024, 256), (131072, 48, 512)]
)
def test_maps_are_up_to_256_pixels_wide(n: int, heads: int, tile: int) -> None:
    assert tile_for(n, heads) == tile


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(REGISTRY, "test-near", Near)
    return "test-near(size=40)"


def decoded(text: str, size: int) -> Tensor:
    return torch.tensor(list(base64.b64decode(text))).view(size, size)


def test_a_whole_result(near: str, tmp_path: Path) -> None:
    model, tokenizer = tiny()
    ids = needle_prompt(tokenizer, 600)
    told: list[tuple[float, str]] = []
    result = inspect(
        model, tokenizer, ids, prefill=near, name="tiny", source="needle", progress=lambda *step: told.append(step)
    )
    settings = {"prompt": "needle", "length": 600, "prefill": near, "tile": 4, "sinks": 4, "ngram": 8, "rows": 512}
    assert result["schema"] == "saccade.inspect/1" and settings.items() <= result["settings"].items()
    assert result["settings"]["repeats"] == head_scores.repeats(ids)[0].numel() > 0
    assert [share for share, _ in told] == sorted(share for share, _ in told) and told[-1][0] == 1.0
    attention = result["attention"]
    assert "".join(attention["texts"]) == tokenizer.decode(ids, skip_special_tokens=True)
    assert [layer["layer"] for layer in attention["layers"]] == [0, 1]
    with capture(model) as layers, torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for layer, seen in zip(attention["layers"], layers, strict=True):
        assert layer["mass_from"] == "rows" and layer["density"] == pytest.approx(layer["heads"][0]["density"][near], rel=1e-6)
        weights = probabilities(seen.q, seen.k, 0, seen.scale, None)
        back = torch.arange(600)[:, None] - torch.arange(600)
        mask = (back >= 0) & (back < 40)
        rows = kept.sampled_rows(600, 512, seed=layer["layer"])
        for head, whole in zip(layer["heads"], weights, strict=True):
            assert (head["size"], head["kv_head"]) == (150, head["head"] // 2)
            expected = (255 * maps.log_scaled(pooled(whole, 4, 4) / 4)).round()
            assert (decoded(head["map"], 150) - expected).abs().max() <= 1, "a step of rounding"
            assert head["mass"][near] == pytest.approx(float((whole * mask)[rows].sum(-1).mean()), abs=1e-5)
            assert head["density"][near] == pytest.approx(float(mask.sum() / (600 * 601 / 2)))
            assert head["sink"] == pytest.approx(float(whole[4:, :4].sum(-1).mean()), abs=1e-5)
        share = decoded(layer["heads"][0]["selections"][near], 150) / 255
        visible = pooled(torch.ones(600, 600).tril(), 4, 4).clamp(min=1)
        assert (share - pooled(mask.float(), 4, 4) / visible).abs().max() <= 1 / 255
    save(result, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["attention"]["length"] == 600
    plain = inspect(model, tokenizer, ids[:64])
    assert plain["settings"]["prefill"] is None and plain["attention"]["layers"][0]["heads"][0]["mass"] == {}
    assert plain["attention"]["layers"][0]["mass_from"] is None and plain["settings"]["tile"] == 1


def test_what_can_not_be_inspected_is_said(monkeypatch: pytest.MonkeyPatch, near: str) -> None:
    model, tokenizer = tiny()
    with pytest.raises(ValueError, match="has 5 tokens: give one of at least 8"):
        inspect(model, tokenizer, [1, 4, 5, 6, 7])
    with pytest.raises(ValueError, match="5000 tokens, the model 4096 positions"):
        inspect(model, tokenizer, [1] * 5000)
    with pytest.raises(ValueError, match="has a cache method: only what a prefill method reads"):
        check_prefill("minference+snapkv")
    with pytest.raises(ValueError, match="did you mean"):
        check_prefill("minferense")
    info: Any = Near.info
    monkeypatch.setattr(Near, "info", type(info)(slug="test-near", phase="prefill", needs=frozenset({"calibration"})))
    with pytest.raises(ValueError, match="test-near needs a calibration plan"):
        check_prefill(near)
    plan = Plan(slug="test-near", spec=near, fingerprint="another", tensors={}, notes={})
    assert check_prefill(near, [plan]).plans == [plan]
    with pytest.raises(ValueError, match="made for another model"):
        inspect(model, tokenizer, list(range(3, 40)), prefill=near, plans=[plan])


def test_the_pocket_model_has_retrieval_heads_and_sink_heads(pocket: Any) -> None:
    model, tokenizer = pocket
    result = inspect(model, tokenizer, needle_prompt(tokenizer, 1024))
    scores = {(layer["layer"], head["head"]): head for layer in result["attention"]["layers"] for head in layer["heads"]}
    strong = {place for place, head in scores.items() if head["retrieval"] > 0.1}
    assert 2 <= len(strong) <= 12 and {layer for layer, _ in strong} <= {3, 4, 5, 6}, strong
    assert max(head["sink"] for head in scores.values()) > 0.5 and min(head["sink"] for head in scores.values()) < 0.02
