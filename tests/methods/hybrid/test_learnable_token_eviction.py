"""learnable-token-eviction: what is seen, what is kept and evicted, what the scorer reads, and what it learns."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import saccade
from saccade.methods.hybrid.learnable_token_eviction import TokenBudget, TokenEvictionMixer, token_eviction_layers
from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM
from saccade.models.decoder.saving import load_cache, save_cache

SAME = 1e-10
TIGHT = "learnable-token-eviction(window=12, buffer=5, sinks=2)"


def layer(spec: str = TIGHT, **sizes) -> TokenEvictionMixer:
    """In evaluation mode; the scorer's last bias is taken away, so that about half the tokens are selected."""
    torch.manual_seed(0)
    made = saccade.mixer(spec, **{"dim": 32, "heads": 4, "kv_heads": 2, **sizes}).double().eval()
    assert isinstance(made, TokenEvictionMixer) and made.scorer.head.bias is not None
    assert (made.scorer.head.bias == 0.5).all()
    made.scorer.head.bias.data.zero_()
    return made


def selecting(mixer: TokenEvictionMixer, logit: float) -> TokenEvictionMixer:
    """The same with one logit for every token."""
    mixer.scorer.head.weight.data.zero_()
    mixer.scorer.head.bias.data.fill_(logit)  # pyright: ignore[reportOptionalMemberAccess]
    return mixer


def tokens(n: int, b: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(b, n, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention_of(mixer: TokenEvictionMixer, spec: str) -> nn.Module:
    made = saccade.mixer(spec, dim=32, heads=4, kv_heads=2).double()
    made.load_state_dict({name: x for name, x in mixer.state_dict().items() if not name.startswith("scorer")})
    return made


def scores_of(mixer: TokenEvictionMixer, x: torch.Tensor) -> torch.Tensor:
    """Scores `(B, Hk, N)` of a whole sequence; the last `margin` of them are not final."""
    call, m = mixer.whole(x), mixer.method.margin
    r = mixer.project(x, call)[3]
    return mixer.scorer(F.pad(r, (0, 0, 0, 0, m, m)), call.start - m, call.ends)


@torch.no_grad()
def test_with_all_tokens_selected_it_is_full_attention():
    x = tokens(60)
    for training, spec in ((False, "learnable-token-eviction(window=12, buffer=60)"), (True, TIGHT)):
        mixer = selecting(layer(spec), 9.0).train(training)
        full = attention_of(mixer, "softmax")(x)[0]
        assert (mixer(x)[0] - full).abs().max() < SAME
    # a full buffer, and not in training, no more
    assert (selecting(layer(), 9.0)(x)[0] - full).abs().max() > 1e-3


@torch.no_grad()
def test_with_no_token_selected_it_is_a_window_and_sinks():
    x = tokens(60)
    for sinks in (0, 2):
        mixer = selecting(layer(f"learnable-token-eviction(window=12, buffer=5, sinks={sinks})"), -9.0)
        assert (mixer(x)[0] - attention_of(mixer, f"softmax(window=13, sinks={sinks})")(x)[0]).abs().max() < SAME
        assert (mixer(x)[1].values["store"].counts == sinks).all()


@torch.no_grad()
def test_the_buffer_evicts_the_lowest_score_token_by_token():
    """Against lists kept by hand: a token that leaves the window enters if it is selected and there is room or its score is above the
    least, which then leaves; each query reads sinks, buffer and window in one softmax."""
    mixer, n, window, most = layer(), 70, 12, 7
    x = tokens(n)
    q, k, v, _ = mixer.project(x, mixer.whole(x))
    scores = scores_of(mixer, x)
    expected, evicted = torch.zeros(2, 4, n, 8, dtype=torch.float64), 0
    held: dict[tuple[int, int], dict[int, float]] = {}
    for b in range(2):
        for h in range(2):
            kept = held.setdefault((b, h), {})
            for i in range(n):
                j = i - window - 1
                if j >= 0:
                    s = float("inf") if j < 2 else float(scores[b, h, j])
                    least = min(kept, key=lambda t, kept=kept: (kept[t], -t)) if kept else -1
                    if s > 0 and len(kept) < most:
                        kept[j] = s
                    elif s > 0 and s > kept[least]:
                        del kept[least]
                        kept[j] = s
                        evicted += 1
                seen = [*sorted(kept), *range(max(i - window, 0), i + 1)]
                for head in (2 * h, 2 * h + 1):
                    weights = (q[b, head, i] @ k[b, h, seen].T * 8**-0.5).softmax(-1)
                    expected[b, head, i] = weights @ v[b, h, seen]
    assert evicted > 20
    y = mixer.o_proj(expected.transpose(1, 2).flatten(2))
    whole, state = mixer(x)
    assert (whole - y).abs().max() < SAME and (mixer.naive(x) - y).abs().max() < SAME
    for (b, h), kept in held.items():
        rows = state.values["store"].rectangle()
        assert torch.equal(rows.keys[b, h, : len(kept)], k[b, h, sorted(kept)])
    for lengths in ([1] * n, [30, 1, 1, 25, 13]):
        outs, after = [], None
        for part in x.split(lengths, 1):
            out, after = mixer(part, after)
            outs.append(out)
        assert (torch.cat(outs, 1) - y).abs().max() < SAME


@torch.no_grad()
def test_long_prompts_are_read_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch):
    mixer, x = layer(), tokens(90)
    whole = mixer(x)[0]
    monkeypatch.setattr("saccade.methods.hybrid.learnable_token_eviction.ROWS", 16)
    assert (mixer(x)[0] - whole).abs().max() < SAME
    mixer.train()
    mixer.scorer.eval()
    monkeypatch.setattr("saccade.methods.hybrid.learnable_token_eviction.ROWS", 1000)
    unbounded = mixer(x)[0]
    monkeypatch.setattr("saccade.methods.hybrid.learnable_token_eviction.ROWS", 16)
    assert (mixer(x)[0] - unbounded).abs().max() < SAME and (whole - unbounded).abs().max() > 1e-3


@torch.no_grad()
def test_padded_batches_evict_as_their_rows_do_alone():
    mixer, x = layer(), tokens(80, b=3)
    valid = torch.ones(3, 80, dtype=torch.bool)
    valid[0, :17], valid[1, 60:], valid[2, [0, 1, 40, 41, 79]] = False, False, False
    y, state = mixer(x, valid=valid)
    after = tokens(4, b=3, seed=9)
    turn, _ = mixer(after, state)
    for row in range(3):
        alone, end = mixer(x[row : row + 1, valid[row]])
        assert (y[row, valid[row]] - alone[0]).abs().max() < SAME
        assert (turn[row] - mixer(after[row : row + 1], end)[0][0]).abs().max() < SAME


@torch.no_grad()
def test_entries_per_head_never_exceed_the_capacity_and_their_storage_is_freed():
    mixer, x, state = layer(), tokens(120, b=1), None
    counts, entry = [], 8 * (8 + 8) + 8  # a key, a value and a score in float64
    fixed = None
    for t in range(120):
        _, state = mixer(x[:, t : t + 1], state)
        store, ring = state.values["store"], state.values["k"].shape[1]
        assert ring == 13 and int(store.counts.max()) <= 7
        counts.append(store.counts.clone())
        assert store.nbytes == int(store.counts.sum()) * entry + 8 * 2
        rest = state.nbytes - store.nbytes
        assert fixed in (None, rest)
        fixed = rest
    whole = mixer(x)[1]
    assert state is not None and whole.nbytes == state.nbytes
    for held in whole.values.values():
        assert not isinstance(held, torch.Tensor) or held.untyped_storage().nbytes() == held.numel() * 8
    assert not counts[12].any() and (counts[-1] == 7).all()
    assert any(int(c[0, 0]) != int(c[0, 1]) for c in counts), "heads keep different numbers"
    for before, after in pairwise(counts):
        assert ((after - before >= 0) & (after - before <= 1)).all()


@torch.no_grad()
def test_scores_look_both_ways_as_far_as_the_margin_and_not_at_positions():
    mixer, x = layer(), tokens(40, b=1)
    assert mixer.method.margin == 6
    before = scores_of(mixer, x)
    u = mixer.project(x, mixer.whole(x))[3].flatten(2).mT
    assert u.shape == (1, 32, 40)
    for conv in mixer.scorer.convs:
        u = F.silu(F.conv1d(u, conv.weight, conv.bias, padding="same", dilation=2, groups=2))  # pyright: ignore
    assert u.shape == (1, 4, 40)
    assert (before - (mixer.scorer.head(u).sigmoid() - 0.5)).abs().max() < SAME
    for j in (0, 20, 39):
        other = x.clone()
        other[:, j] += 1
        changed = ((scores_of(mixer, other) - before).abs() > 0).any(1)[0].nonzero().flatten()
        # kernels of 3 with gaps of 2 see every second token
        assert changed.tolist() == [i for i in range(40) if abs(i - j) <= 6 and (i - j) % 2 == 0]
    state = mixer(x[:, :20])[1]
    kept = state.values["scores"]
    assert kept.shape == (1, 7, 2) and (kept.transpose(1, 2) - before[:, :, 7:14]).abs().max() < SAME
    moved = mixer(x, positions=torch.arange(500, 540)[None])[1]
    assert (moved.values["scores"] - mixer(x)[1].values["scores"]).abs().max() == 0
    assert (moved.values["k"] - mixer(x)[1].values["k"]).abs().max() > 0.1
    relu = layer("learnable-token-eviction(window=12, score='relu')")
    assert (scores_of(relu, x) > 0).equal(before > 0) and scores_of(relu, x).min() == 0


def test_the_scores_gradient_is_that_of_the_values_along_them():
    """ds_j = <dv_j, v_j>, for all tokens, the value itself unchanged."""
    mixer, x = layer(), tokens(40)
    taken, project = {}, mixer.project

    def watched(*given: torch.Tensor):
        q, k, v, r = project(*given)  # pyright: ignore[reportArgumentType]
        v = v.detach().requires_grad_()
        taken["v"] = v
        return q, k, v, r

    mixer.project = watched  # pyright: ignore[reportAttributeAccessIssue]
    scorer = mixer.scorer.forward

    def noted(*given: torch.Tensor) -> torch.Tensor:
        taken["scores"] = scorer(*given).detach().requires_grad_()
        return taken["scores"]

    mixer.scorer.forward = noted  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        plain = mixer(x)[0]
    y = mixer(x, keep=False)[0]
    assert (y - plain).abs().max() < SAME
    dv, ds = torch.autograd.grad((y * tokens(40, seed=5)).sum(), [taken["v"], taken["scores"]])
    along = (dv * taken["v"]).sum(-1)
    assert ds.shape == (2, 2, 46) and not ds[..., :6].any()
    assert (ds[..., 6:] - along).abs().max() < SAME and along.abs().max() > 1e-2


def test_the_loss_and_its_weights_follow_the_rule():
    mixer = layer("learnable-token-eviction(window=12, buffer=10, sinks=2, dropout=0.0)").train()
    budget = TokenBudget(mixer, every=4)
    with pytest.raises(ValueError, match="nothing to count"):
        budget()
    x = tokens(40)
    scores = scores_of(mixer, x)[..., :34]  # the last margin does not count
    selected = (scores > 0) | (torch.arange(34) < 2)
    count = selected.double().mean((0, 2)) * 40
    budget.weights.copy_(torch.tensor([[0.5, 2.0]]))
    mixer(x, keep=False)
    loss = budget()
    assert abs(float(loss.detach() - (torch.tensor([0.5, 2.0])[:, None] * scores.relu()).mean().detach())) < 1e-6
    (grad,) = torch.autograd.grad(loss, mixer.scorer.head.weight)
    assert grad.abs().max() > 0
    assert torch.allclose(budget.kept[0].double(), count * 2 / 3, atol=1e-4)  # a share of 2 / (1 + 4 / 2) after one step
    # above, within and below the band of 0.95 to 1 times the buffer; only at the end of `every` steps
    for kept, before, after in (
        (12.0, 0.0, 1e-9), (12.0, 4e-3, 6e-3), (12.0, 0.9, 1.0), (9.8, 4e-3, 4e-3), (9.8, 0.0, 1e-9), (9.0, 4e-3, 2e-3), (9.0, 1.5e-9, 0.0),
    ):  # fmt: skip
        budget.kept.fill_(kept)
        budget.weights.fill_(before)
        for step in range(4):
            assert torch.allclose(budget.weights, torch.full((1, 2), before)), step
            budget.step()
        assert torch.allclose(budget.weights, torch.full((1, 2), after), rtol=1e-5, atol=1e-12), (kept, before)
    again = TokenBudget(mixer, every=4)
    again.load_state_dict(budget.state_dict())
    assert torch.equal(again.kept, budget.kept) and not any(name.startswith("_layers") for name in budget.state_dict())
    with pytest.raises(ValueError, match="0 layers"):
        TokenBudget(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="factors above 1"):
        TokenBudget(mixer, grow=1.0)


def asked(b: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """32 tokens: two hold a key and a value, far before the end, the rest is noise; at the end one key stands again."""
    x, rows = torch.randint(20, 28, (b, 33), generator=g), torch.arange(b)
    at, keys = (torch.rand(b, m, generator=g).argsort(1)[:, :2] for m in (26, 4))
    values, which = torch.randint(0, 4, (b, 2), generator=g), torch.randint(0, 2, (b,), generator=g)
    x[rows[:, None], at] = keys * 4 + values
    x[:, -1] = 16 + keys[rows, which]
    holds = torch.zeros(b, 33, dtype=torch.bool)
    holds[rows[:, None], at] = True
    return x, values[rows, which], holds


@pytest.mark.slow
def test_the_scorer_learns_to_keep_what_is_asked_for_within_the_budget():
    torch.manual_seed(1)
    g = torch.Generator().manual_seed(2)
    spec = "learnable-token-eviction(window=4, buffer=4, sinks=0, kernels=(3,), dilations=(1,), dropout=0.0)"
    table, mixer, head = nn.Embedding(28, 16), saccade.mixer(spec, dim=16, heads=2), nn.Linear(16, 4)
    assert isinstance(mixer, TokenEvictionMixer)
    budget = TokenBudget(mixer, every=2, least=1e-2)
    optimizer = torch.optim.AdamW([p for part in (table, mixer, head) for p in part.parameters()], lr=1e-2, weight_decay=0)

    @torch.no_grad()
    def measured() -> tuple[float, float, float, float]:
        """Accuracy of generation, tokens selected per head, and the share selected of tokens with a pair and of noise."""
        x, y, holds = asked(256, torch.Generator().manual_seed(7))
        mixer.train()
        mixer(table(x), keep=False)
        assert mixer.routed is None
        with torch.enable_grad():
            mixer(table(x), keep=False)
        assert mixer.routed is not None
        chosen, mixer.routed = mixer.routed.selected[..., :-1].float().transpose(1, 2), None
        holds = holds[:, :-1]
        mixer.eval()
        right = (head(mixer(table(x))[0][:, -1]).argmax(-1) == y).float().mean()
        mixer.train()
        return float(right), float(chosen.sum(1).mean()), float(chosen[holds].mean()), float(chosen[~holds].mean())

    before = measured()
    for _ in range(120):
        x, y, _ = asked(32, g)
        loss = F.cross_entropy(head(mixer(table(x), keep=False)[0][:, -1]), y) + budget()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.step()
    right, kept, pairs, noise = measured()
    assert before[0] < 0.4 and before[1] > 16 and abs(before[2] - before[3]) < 0.1
    assert right > 0.65 and kept < 5 and pairs > 0.25 and noise < pairs / 3, (before, right, kept, pairs, noise)
    # it is these tokens that answer: with none kept nothing is found
    selecting(mixer, -9.0)
    assert measured()[0] < 0.45


@torch.no_grad()
def test_in_a_decoder_steps_batches_and_caches_agree(tmp_path):
    torch.manual_seed(3)
    layers = token_eviction_layers(4, window=12, buffer=5, sinks=2)
    assert layers[0] == layers[2] == "kimi-linear(gate='token')" and layers[1] == layers[3] == TIGHT
    lm = SaccadeForCausalLM(SaccadeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        layers=layers, eos_token_id=None, pad_token_id=0,
    )).double().eval()  # fmt: skip
    mixers = [part for part in lm.modules() if isinstance(part, TokenEvictionMixer)]
    assert len(mixers) == 2 and all((part.scorer.head.bias == 0.5).all() for part in mixers)  # pyright: ignore
    ids = torch.randint(3, 64, (2, 50), generator=torch.Generator().manual_seed(4))
    whole = lm(ids).logits
    out = lm(ids[:, :11], use_cache=True)
    steps = [out.logits]
    for t in range(11, 50):
        out = lm(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() < SAME
    assert int(out.past_key_values.layers[1].state.values["store"].counts.max()) == 7
    padded = torch.cat([torch.cat([torch.zeros(1, 9, dtype=torch.int64), ids[:1, :41]], 1), ids[1:]])
    mask = padded != 0
    both = lm.generate(padded, attention_mask=mask.long(), max_new_tokens=12, do_sample=False)
    for row in range(2):
        alone = lm.generate(padded[row : row + 1, mask[row]], max_new_tokens=12, do_sample=False)
        assert torch.equal(both[row, 50:], alone[0, -12:])
    assert lm.generate(ids, max_new_tokens=6, do_sample=False, num_beams=3).shape == (2, 56)
    lm.save_pretrained(tmp_path / "model")
    again = SaccadeForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    assert torch.equal(again(ids).logits, whole)
    cache = lm(ids[:, :49], use_cache=True).past_key_values
    save_cache(tmp_path / "cache.safetensors", cache, lm)
    after = lm(ids[:, 49:], past_key_values=load_cache(tmp_path / "cache.safetensors", lm)).logits
    assert (after[:, 0] - whole[:, 49]).abs().max() < SAME
    with pytest.raises(ValueError, match="at least 1"):
        token_eviction_layers(0)


@pytest.mark.parametrize(("fields", "message"), [
    ("window=-1", "at least 0 of each"), ("kernels=(3,)", "one dilation for each kernel"), ("kernels=(3, 2, 3)", "odd width"),
    ("dilations=(2, 0, 2)", "at least 1"), ("window=4", "the 6 after it that its score needs"), ("score='tanh'", "'sigmoid' or 'relu'"),
    ("dropout=1.0", "below 1"), ("theta=0", "positive base"),
])  # fmt: skip
def test_wrong_fields_are_refused(fields: str, message: str):
    with pytest.raises(ValueError, match=message):
        saccade.mixer(f"learnable-token-eviction({fields})", dim=32, heads=4)
    with pytest.raises(ValueError, match="even head_dim"):
        saccade.mixer("learnable-token-eviction", dim=9, heads=3)
