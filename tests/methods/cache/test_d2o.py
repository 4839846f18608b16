"""D2O (d2o, 2406.13035): the claims of the paper, on constructed data and on the pocket model."""

from __future__ import annotations

import pytest
import torch
from tests.cache.single import Single, random_qkv
from tests.contract.harness import error, greedy, llama, logits, tokens
from tests.methods.cache.clustered import clustered, look, relative
from tests.methods.cache.needles import pocket, streams
from tests.methods.cache.reading import divergence, size
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.attach import capture
from saccade.cache import Slots
from saccade.core import CachePolicy
from saccade.methods import build
from saccade.methods.cache.d2o import D2O, RATIOS, TAU
from saccade.methods.cache.h2o import H2O
from saccade.parts.merging import COUNT

ALONE = {"skip_layers": (), "sinks": 0}  # one layer: its ratio is rho


def compressed(policy: CachePolicy, q: Tensor, k: Tensor, v: Tensor) -> Slots:
    single = Single(policy)
    single.feed(q, k, v)
    single.end_prompt()
    return single.layer.open()


def spreads(model, ids: Tensor) -> Tensor:
    """f of each layer from its whole attention map, `(B, L)`."""
    found = []
    with capture(model) as layers, torch.no_grad():
        model(ids)
    for x in layers:
        n = x.q.shape[2]
        scores = x.q.double() @ x.k.double().repeat_interleave(x.q.shape[1] // x.k.shape[1], 1).mT * x.scale
        sums = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1).sum(2)
        variance = sums.var(-1, correction=0)
        low, high = variance.amin(1, keepdim=True), variance.amax(1, keepdim=True)
        found.append(((variance - low) / (high - low)).mean(1))
    return torch.stack(found, -1)


def kept_counts(model, spec: str, ids: Tensor, chunks: tuple[int, ...] = (), back: int = 0) -> list[list[int]]:
    """Entries per layer and batch row after the prompt, `back` of whose tokens are taken back."""
    cache = DynamicCache(config=model.config)
    with saccade.attach(model, cache=spec) as handle, torch.no_grad():
        begin = 0
        for length in (*chunks, ids.shape[1] - sum(chunks)):
            model(ids[:, begin : begin + length], past_key_values=cache)
            begin += length
        if back:
            cache.crop(-back)
        handle.compress(cache)
        return [[head for head, *_ in layer.lengths()] for layer in cache.layers]


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.9])
def test_layers_with_spread_out_attention_get_more(rho: float) -> None:
    """ratio_l = L rho softmax(-f_l); where that passes 1, the other layers get what is left over."""
    model, ids = pocket(), streams(2, 299, seed=4)
    f = spreads(model, ids)[:, 2:7]
    expected = 5 * rho * torch.softmax(-f, -1)
    assert (expected.sum(-1) - 5 * rho).abs().max() < 1e-12
    counts = torch.tensor(kept_counts(model, f"d2o(budget={rho})", ids)).T
    assert (counts[:, [0, 1, 7]] == 300).all(), "the first two layers and the last are never compressed"
    counts = counts[:, 2:7]
    if bool((expected <= 1).all()):
        assert (counts - (expected * 300).ceil()).abs().max() <= 1
        assert (counts.argsort(-1) == f.argsort(-1, descending=True)).all() and (counts[:, 0] != counts[:, 4]).any()
    assert ((counts.sum(-1) - 5 * rho * 300).abs() <= 5).all()


@pytest.mark.parametrize("chunks", [(20, 30), (45, 10), (57, 2)], ids=str)
def test_budgets_do_not_depend_on_chunks_or_guesses(chunks: tuple[int, ...]) -> None:
    model, ids = llama(), tokens(3, 70)
    spec = "d2o(budget=0.4, skip_layers=())"
    once = kept_counts(model, spec, ids[:, :60])
    assert kept_counts(model, spec, ids[:, :60], chunks) == once
    assert kept_counts(model, spec, ids, chunks, back=10) == once
    assert once[0] != once[1]


def test_compressing_after_every_call_waits_for_all_layers() -> None:
    model, ids = llama(), tokens(1, 90)
    cache = DynamicCache(config=model.config)
    with saccade.attach(model, cache="d2o(budget=0.4, skip_layers=())", when="call"), torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        # the first layer came before the second had seen anything
        first, second = (layer.lengths()[0][0] for layer in cache.layers)
        assert first == 40 and second < 40
        model(ids[:, 40:], past_key_values=cache)
        first, second = (layer.lengths()[0][0] for layer in cache.layers)
        assert first + second == pytest.approx(2 * 0.4 * 90, abs=2)


def test_everything_stays_at_rho_one() -> None:
    model, ids = llama(), tokens(2, 70)
    dense = logits(model, ids, steps=10)
    with saccade.attach(model, cache="d2o(budget=1.0, skip_layers=())"):
        assert error(logits(model, ids, steps=10), dense) < 1e-9


@pytest.mark.parametrize("recent", [0.0, 0.25, 0.5])
def test_without_folding_it_is_h2o(recent: float) -> None:
    """A threshold that no cosine reaches: outputs of a prompt and 30 steps are those of H2O at the layer's ratio."""
    q, k, v = random_qkv(110, batch=2)
    plain, dropping = Single(H2O(budget=0.3, recent=recent)), Single(D2O(budget=0.3, recent=recent, threshold=2.0, **ALONE))
    for single in (plain, dropping):
        single.feed(*(x[:, :, :80] for x in (q, k, v)))
    a, b = (single.steps(*(x[:, :, 80:] for x in (q, k, v))) for single in (plain, dropping))
    assert (a - b).abs().max() < 1e-12
    assert [plain.kept(row) for row in (0, 1)] == [dropping.kept(row) for row in (0, 1)]


@pytest.mark.parametrize("weights", ["exponential", "cosine"])
def test_equal_entries_leave_their_survivor_as_it_is(weights: str) -> None:
    """Every other entry repeats the one before."""
    q, k, v = random_qkv(60, query_heads=2, kv_heads=1)
    k, v = (x[:, :, ::2].repeat_interleave(2, 2) for x in (k, v))
    slots = compressed(D2O(budget=0.5, recent=0.0, weights=weights, threshold=0.999, **ALONE), q, k, v)
    index = slots.side["positions"].long().unsqueeze(-1).expand_as(slots.keys)
    assert (slots.keys - k.gather(2, index)).abs().max() < 1e-12
    assert (slots.values - v.gather(2, index)).abs().max() < 1e-12
    assert int(slots.side[COUNT].max()) == 2


def test_the_first_entries_stay() -> None:
    q, k, v = random_qkv(100, sharp=0.1)
    q[..., 0], k[:, :, :4, 0] = 2.0, -20.0  # nobody looks at them
    for sinks in (0, 4):
        kept = compressed(D2O(budget=0.2, sinks=sinks, skip_layers=(), threshold=2.0), q, k, v).side["positions"]
        assert ((kept[..., :4] == torch.arange(4)).all(-1) == (sinks == 4)).all()


def test_threshold_moves_and_decides() -> None:
    q, k, v = random_qkv(90)
    single = Single(D2O(budget=20 / 60, recent=0.5, keep_tau=0.25, new_tau=0.75, **ALONE))
    single.feed(*(x[:, :, :60] for x in (q, k, v)))
    single.end_prompt()
    state = single.layer.states.get("cache", None)
    slots = single.layer.open()
    kept = slots.side["positions"].long()
    u = []
    for h in range(2):
        gone = sorted(set(range(60)) - set(kept[0, h].tolist()))
        cosines = torch.nn.functional.cosine_similarity(k[0, h, gone].unsqueeze(1), k[0, h, kept[0, h]].unsqueeze(0), dim=-1)
        u.append(cosines.amax(-1))
    both = torch.stack(u)
    tau = both.mean()
    assert state[TAU][0] == pytest.approx(float(tau))
    # the i-th evicted entries of both heads are judged together
    folded = int((both.mean(0) >= tau).sum())
    assert 0 < folded < both.shape[1]
    assert ((slots.side[COUNT] - 1).sum(-1) == folded).all()
    single.feed(*(x[:, :, 60:61] for x in (q, k, v)))
    assert single.layer.physical == 21 and state[TAU][0] == pytest.approx(float(tau)), "61 tokens allow for 21 entries"
    before = single.layer.open()
    single.feed(*(x[:, :, 61:62] for x in (q, k, v)))
    gone_u = []
    for h in range(2):
        held = [*before.side["positions"][0, h].tolist(), 61]
        after = single.kept()[h]
        evicted = (set(held) - set(after)).pop()
        keys = torch.cat([before.keys[0, h], k[0, h, 61:62]])
        survivors = keys[[i for i, p in enumerate(held) if p != evicted]]
        gone_u.append(torch.nn.functional.cosine_similarity(keys[held.index(evicted)][None], survivors, dim=-1).max())
    assert single.layer.physical == 21
    assert state[TAU][0] == pytest.approx(float(0.25 * tau + 0.75 * torch.stack(gone_u).mean()))


@pytest.mark.parametrize("seed", range(4))
def test_errors_fall_from_h2o_to_d2o_on_clustered_keys(seed: int) -> None:
    """200 tokens in 20 clusters, a fifth kept. Measured: 0.42, 0.36, 0.33, 0.45 to 0.36, 0.29, 0.23, 0.39 for the four seeds.

    With the log of the counts added to the logits, which the paper does not do, errors fall further.
    """
    q, k, v, later = clustered(200, 20, seed=seed)
    dense = look(later, k, v)
    found = {}
    for name, policy in (
        ("h2o", H2O(budget=0.2)), ("d2o", D2O(budget=0.2, **ALONE)), ("cosine", D2O(budget=0.2, weights="cosine", **ALONE)),
    ):  # fmt: skip
        slots = compressed(policy, q, k, v)
        found[name] = relative(look(later, slots.keys, slots.values), dense)
        if name == "d2o":
            bias = slots.side[COUNT].double().log().repeat_interleave(2, 1).unsqueeze(2)
            weights = (later @ slots.keys.repeat_interleave(2, 1).mT / 4 + bias).softmax(-1)
            found["counted"] = relative(weights @ slots.values.repeat_interleave(2, 1), dense)
    assert 0 < found["d2o"] < 0.9 * found["h2o"]
    assert found["cosine"] < found["h2o"] and found["counted"] < found["d2o"]


@pytest.mark.slow
def test_pocket_layer_budgets_help_and_the_floor_is_beaten() -> None:
    """Half the cache in all layers. Measured, bits from dense, at a half / a quarter: random 0.149 / 0.275, H2O 0.090 / 0.196, layer
    budgets without folding 0.082 / 0.191, D2O 0.123 / 0.229: on this model folding into rotated keys costs more than dropping.
    """
    layered, folded = (divergence(f"d2o(budget=0.25, skip_layers=(){more})") for more in (", threshold=2.0", ""))
    assert layered < divergence("h2o(budget=0.25)")
    assert folded < 0.9 * divergence("random(budget=0.25)")
    assert size("d2o(budget=0.25, skip_layers=())") < 0.27 * size(None)


def test_ratios_go_with_their_rows() -> None:
    """Beams change places: what the layers share about a row does too."""
    model, ids, more = llama(), tokens(3, 60), tokens(3, 12, seed=3)
    order = torch.tensor([2, 0, 1])
    with saccade.attach(model, cache="d2o(budget=0.4, skip_layers=())"), torch.no_grad():
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for cache in caches:
            model(ids, past_key_values=cache)
        caches[1].reorder_cache(order)
        for i in range(12):
            a = model(more[:, i : i + 1], past_key_values=caches[0]).logits
            b = model(more[order, i : i + 1], past_key_values=caches[1]).logits
            assert error(a[order], b) < 1e-9


def test_settled_ratios_serve_later_turns() -> None:
    model, ids = llama(), tokens(1, 60)
    cache = DynamicCache(config=model.config)
    with saccade.attach(model, cache="d2o(budget=0.4, skip_layers=())"):
        first = greedy(model, ids, 6, past_key_values=cache)
        ratios = cache.layers[0].sequence(0)[RATIOS].clone()
        greedy(model, torch.cat([first, tokens(1, 30, seed=5)], 1), 6, past_key_values=cache)
        assert torch.equal(cache.layers[0].sequence(0)[RATIOS], ratios)
        kept = [layer.lengths()[0][0] for layer in cache.layers]
    assert kept == [int(n) for n in (ratios[0] * cache.get_seq_length()).ceil()]


@pytest.mark.parametrize(
    "fields",
    [
        "budget=0.001", "budget=2", "budget=True", "recent=1.5", "sinks=-1", "keep_tau=-0.1", "new_tau=-1", "weights='mean'",
        "skip_layers=3",
    ],
)  # fmt: skip
def test_fields_are_checked(fields: str) -> None:
    with pytest.raises(ValueError, match=fields.split("=")[0]):
        build(f"d2o({fields})")
