"""nats-l: two operators over typed chunks, what each reads, what is kept, and what the router learns."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import saccade
from saccade.core import MixerState
from saccade.methods.hybrid.nats_l import NatsLMixer, nats_layers
from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM
from saccade.models.decoder.saving import load_cache, save_cache
from saccade.ops.scan import scan

SAME = 1e-10


def layer(spec: str = "nats-l(chunk=8, split=2)", **sizes) -> NatsLMixer:
    torch.manual_seed(0)
    made = saccade.mixer(spec, **{"dim": 32, "heads": 4, **sizes}).double()
    assert isinstance(made, NatsLMixer)
    return made


def tokens(n: int, b: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(b, n, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def forced(mixer: NatsLMixer, wanted: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x with a channel from which the router reads the wanted types (True: attention) `(B, chunks, groups)`, of chunk means 1 and -1."""
    c = mixer.method.chunk
    with torch.no_grad():
        mixer.router.weight.zero_()
        for group in range(mixer.groups):
            mixer.router.weight[2 * group, group] = 50.0
    n, x = x.shape[1], x.clone()
    signs = (wanted.double() * 2 - 1).repeat_interleave(c, 1)[:, :n]
    x[:, : signs.shape[1], : mixer.groups] = signs
    return x


def branches(mixer: NatsLMixer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention and the delta rule give before their norms."""
    seen = []
    finish = mixer.finish
    mixer.finish = lambda a, r, *rest: (seen.extend((a, r)), finish(a, r, *rest))[1]  # pyright: ignore[reportAttributeAccessIssue]
    mixer(x, keep=False)
    del mixer.finish
    return seen[0], seen[1]


@torch.no_grad()
def test_with_all_chunks_exact_the_softmax_branch_is_full_attention():
    mixer = layer(kv_heads=2)
    x = forced(mixer, torch.ones(2, 6, 2, dtype=torch.bool), tokens(45))
    attended, read = branches(mixer, x)
    p, _ = mixer.pieces(x, None)
    full = F.scaled_dot_product_attention(p.q_a, p.k_a, p.v_a, is_causal=True, enable_gqa=True)
    assert p.q_a.shape == (2, 8, 45, 4) and p.k_a.shape[1] == 4
    assert (attended - full).abs().max() < SAME
    # the state then holds nothing but the own chunk
    for begin in range(0, 45, 8):
        rows = [one[:, :, begin : begin + 8] for one in (p.q, p.k, p.v, p.log_decay, p.beta)]
        own = scan(*rows[:3], log_decay=rows[3], beta=rows[4])[0]
        assert (read[:, :, begin : begin + 8] - own).abs().max() < SAME


@torch.no_grad()
def test_with_no_chunk_exact_the_other_branch_is_the_gated_delta_rule():
    mixer = layer(kv_heads=2)
    x = forced(mixer, torch.zeros(2, 6, 2, dtype=torch.bool), tokens(45))
    attended, read = branches(mixer, x)
    p, _ = mixer.pieces(x, None)
    plain = scan(p.q, p.k, p.v, log_decay=p.log_decay, beta=p.beta)[0]
    assert (read - plain).abs().max() < SAME
    i = torch.arange(45)
    inside = (i[:, None] // 8 == i // 8) & (i <= i[:, None])
    own = F.scaled_dot_product_attention(p.q_a, p.k_a, p.v_a, attn_mask=inside, enable_gqa=True)
    assert (attended - own).abs().max() < SAME


@torch.no_grad()
@pytest.mark.parametrize("decay", [True, False])
def test_an_attention_chunk_leaves_the_state_as_it_was_but_decayed(decay: bool):
    mixer = layer(f"nats-l(chunk=8, split=2, decay={decay})")
    wanted = torch.zeros(2, 2, 4, dtype=torch.bool)
    wanted[:, 1, :2] = True  # the second chunk, two of four groups
    x = forced(mixer, wanted, tokens(16))
    first, both = mixer(x[:, :8])[1], mixer(x)[1]
    p, _ = mixer.pieces(x, None)
    lost = (p.log_decay[:, :, 8:].sum(-1) * decay).exp()[..., None, None]
    assert not decay or float(lost.max()) < 0.99
    left = first.values["begin"] * lost
    assert (both.values["begin"] - left)[:, :2].abs().max() < SAME
    assert (both.values["begin"] - left)[:, 2:].abs().amax((2, 3)).min() > 1e-3
    # inside the chunk the state was written to all the same
    assert (mixer(x[:, :15])[1].values["now"] - mixer(x[:, :15])[1].values["begin"])[:, :2].abs().max() > 1e-2


@torch.no_grad()
def test_the_keys_kept_are_those_of_attention_chunks_and_of_the_open_one():
    """Per row and head; the bytes are those of these keys and of a state of fixed size."""
    mixer, c = layer(kv_heads=2), 8
    wanted = torch.tensor([[[1, 0], [1, 1], [0, 0], [1, 0]], [[0, 0], [0, 0], [0, 1], [0, 0]]], dtype=torch.bool)
    sizes = []
    for n in (32, 37):
        x = forced(mixer, wanted, tokens(n))
        state = mixer(x)[1]
        kept = state.values["kept"]
        assert kept.counts.tolist() == [[3 * c, 3 * c, c, c], [0, 0, c, c]]  # two attention heads a group
        p, _ = mixer.pieces(x, None)
        held = kept.rectangle()
        assert torch.equal(held.keys[0, 1, : 3 * c], p.k_a[0, 1, torch.cat([torch.arange(16), torch.arange(24, 32)])])
        assert torch.equal(held.values[1, 3, :c], p.v_a[1, 3, 16:24])
        assert torch.equal(state.values["k"][:, : n - 32].transpose(1, 2), p.k_a[:, :, 32:])
        assert not state.values["k"][:, n - 32 :].any()
        entry = 8 * (4 + 8)
        assert kept.nbytes == 10 * c * entry + 8 * 8
        sizes.append(state.nbytes - kept.nbytes)
    assert sizes[0] == sizes[1]
    for x in state.values.values():
        assert not isinstance(x, torch.Tensor) or x.untyped_storage().nbytes() == x.numel() * 8, "a view keeps what it was cut from"
    none = mixer(forced(mixer, torch.zeros(2, 4, 2, dtype=torch.bool), tokens(32)))[1]
    assert state.nbytes - none.nbytes == 10 * c * entry


@torch.no_grad()
def test_a_chunk_is_typed_by_its_own_tokens_when_it_closes():
    mixer, x = layer(), tokens(40, seed=3)
    types = mixer.types(x.unflatten(1, (5, 8)).mean(2))
    assert 0.1 < types[..., 0].mean() < 0.9
    counts = [mixer(x[:, :n])[1].values["kept"].counts for n in range(8, 41)]
    for n, found in zip(range(8, 41), counts, strict=True):
        assert torch.equal(found, 8 * types[:, : n // 8, :, 0].sum(1).long().repeat_interleave(2, 1)), n
    other = x.clone()
    other[:, 16:] = tokens(24, seed=9)
    before, after = (mixer(given)[1].values["kept"].rectangle() for given in (x, other))
    for row, head in counts[8].nonzero().tolist():
        first = int(counts[8][row, head])
        assert torch.equal(before.keys[row, head, :first], after.keys[row, head, :first])
    assert not torch.equal(mixer(other)[1].values["kept"].counts, counts[-1])


@torch.no_grad()
def test_inner_chunks_may_have_one_operator_alone():
    x = tokens(20)
    attended, read = branches(layer("nats-l(chunk=8, split=2, inner='delta')"), x)
    assert not attended[:, :, :8].any() and read[:, :, :8].abs().max() > 1e-3
    attended, read = branches(layer("nats-l(chunk=8, split=2, inner='attention')"), x)
    assert not read[:, :, :8].any() and attended[:, :, :8].abs().max() > 1e-3


@torch.no_grad()
def test_outputs_are_normed_apart_and_weighed_by_shares_from_the_queries():
    mixer, x = layer(), tokens(20)
    attended, read = branches(mixer, x)
    p, _ = mixer.pieces(x, None)
    shares = F.linear(p.raw_q, mixer.weigh.weight).unflatten(-1, (8, 2)).softmax(-1)
    rows = [one.transpose(1, 2).flatten(2).unflatten(2, (8, 8)) for one in (attended, read)]
    normed = [one * (one.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for one in rows]
    mixed = (shares[..., :1] * normed[0] + shares[..., 1:] * normed[1]).flatten(2)
    y = mixer.o_proj(mixed * F.silu(mixer.out_gate.project(x)))
    assert (mixer(x)[0] - y).abs().max() < SAME
    # a delta rule of other scale weighs alike
    loud, louder = (mixer.finish(attended, scale * read, x, p.raw_q) for scale in (1e3, 1e6))
    assert (loud - louder).abs().max() < 1e-2 * y.abs().max() and (loud - y).abs().max() < 0.2 * y.abs().max()


def test_the_router_hears_of_chosen_chunks_and_softly_of_all():
    """Gradients of one loss on the outputs behind a chunk, with respect to its type's probabilities."""
    found = {}
    for soft in (False, True):
        mixer = layer(f"nats-l(chunk=8, split=2, groups=1, soft={soft})")
        x = tokens(24, b=6)
        taken = {}
        types = mixer.types

        def watched(means: torch.Tensor, types=types, taken=taken) -> torch.Tensor:
            made = types(means)
            taken.update(means=means, hard=made.detach())

            made.register_hook(partial(taken.__setitem__, "grad"))
            return made

        mixer.types = watched  # pyright: ignore[reportAttributeAccessIssue]
        (grad,) = torch.autograd.grad(mixer(x, keep=False)[0][:, 16:].square().sum(), mixer.router.weight)
        # through the softmax goes what came to the chosen entries, or softly to all
        heard = taken["grad"] if soft else taken["grad"] * taken["hard"]
        probabilities = mixer.router(taken["means"]).unflatten(-1, (1, 2)).softmax(-1)
        (expected,) = torch.autograd.grad((probabilities * heard).sum(), mixer.router.weight)
        assert (grad - expected).abs().max() < SAME and grad.abs().max() > 1e-6
        found[soft] = (taken["grad"], taken["hard"], grad)
    chosen = found[False][1].bool()
    # the last chunk's type is read by nobody
    assert not found[True][0][:, 2].any()
    assert (found[True][0][:, :2].abs() > 1e-12).all()
    attention = found[False][0][..., 0]
    assert not attention[~chosen[..., 0]].any() and attention[:, :2][chosen[:, :2, :, 0]].abs().min() > 1e-12
    assert (found[False][2] - found[True][2]).abs().max() > 1e-6
    soft, x = layer("nats-l(chunk=8, split=2, soft=True)"), tokens(29)
    with torch.no_grad():
        plain = soft(x)[0]
    assert (soft(x, keep=False)[0] - plain).abs().max() < SAME


@torch.no_grad()
def test_gumbel_noise_is_drawn_in_training_alone():
    mixer = layer("nats-l(chunk=8, split=2, sample='gumbel')")
    means = tokens(400)
    share = mixer.router(means).unflatten(-1, (4, 2)).softmax(-1)[..., 0]
    drawn = torch.stack([mixer.types(means)[..., 0] for _ in range(40)]).mean(0)
    assert abs(float((drawn - share).mean())) < 0.01 and float((drawn - share).abs().mean()) < 0.09
    mixer.eval()
    assert torch.equal(mixer.types(means)[..., 0], (share > 0.5).double())


def asked(b: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eight chunks of four tokens: two hold a mark, a key and its value, the rest noise; at the end one key stands again."""
    x, rows = torch.randint(9, 13, (b, 33), generator=g), torch.arange(b)
    marked, keys = (torch.rand(b, m, generator=g).argsort(1)[:, :2] for m in (7, 4))
    values, which = torch.randint(0, 4, (b, 2), generator=g), torch.randint(0, 2, (b,), generator=g)
    for pair in range(2):
        at = marked[:, pair] * 4
        x[rows, at], x[rows, at + 1], x[rows, at + 2] = 0, 1 + keys[:, pair], 5 + values[:, pair]
    x[:, -1] = 1 + keys[rows, which]
    holds = torch.zeros(b, 7, dtype=torch.bool)
    holds[rows[:, None], marked] = True
    return x, values[rows, which], holds


@pytest.mark.slow
def test_the_router_learns_to_keep_the_chunks_that_are_asked_for():
    """With a state that forgets within a chunk, only attention finds the pair; the noise goes to the state."""
    torch.manual_seed(2)
    g = torch.Generator().manual_seed(3)
    table, mixer, head = nn.Embedding(13, 16), saccade.mixer("nats-l(chunk=4, split=2, groups=1)", dim=16, heads=2), nn.Linear(16, 4)
    assert isinstance(mixer, NatsLMixer)
    mixer.gate.a_log.data.fill_(3.0)
    mixer.gate.bias.data.zero_()
    mixer.gate.requires_grad_(False)
    trained = [p for part in (table, mixer, head) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)

    def measured() -> tuple[float, float, float]:
        """Accuracy, and the share of chunks kept exactly among those with a pair and those with noise."""
        with torch.no_grad():
            x, y, holds = asked(256, torch.Generator().manual_seed(7))
            h = table(x)
            types = mixer.types(h[:, :28].unflatten(1, (7, 4)).mean(2))[..., 0, 0]
            right = (head(mixer(h, keep=False)[0][:, -1]).argmax(-1) == y).float().mean()
            return float(right), float(types[holds].mean()), float(types[~holds].mean())

    before = measured()
    for _ in range(80):
        x, y, _ = asked(32, g)
        loss = F.cross_entropy(head(mixer(table(x), keep=False)[0][:, -1]), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right, marked, noise = measured()
    assert before[0] < 0.4 and before[1] - before[2] < 0.2
    assert right > 0.6 and marked > 0.5 and noise < 0.15, (before, right, marked, noise)
    mixer.router.weight.data.neg_()
    assert measured()[0] < right - 0.25


def model(**fields) -> SaccadeForCausalLM:
    torch.manual_seed(3)
    made = SaccadeForCausalLM(SaccadeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        layers=nats_layers(4, every=4, chunk=8, split=2), eos_token_id=None, pad_token_id=0, **fields,
    ))  # fmt: skip
    return made.double().eval()


@torch.no_grad()
def test_in_a_decoder_steps_batches_and_caches_agree(tmp_path):
    lm = model()
    assert lm.config.specs[:3] == ["kimi-linear(gate='token')"] * 3
    ids = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(4))
    whole = lm(ids).logits
    out = lm(ids[:, :11], use_cache=True)
    steps = [out.logits]
    for t in range(11, 30):
        out = lm(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() < SAME
    counts = out.past_key_values.layers[3].state.values["kept"].counts
    assert counts.unique().numel() > 1, "rows and groups keep different numbers of keys"
    # a padded batch gives each row what it gets alone
    padded = torch.cat([torch.cat([torch.zeros(1, 9, dtype=torch.int64), ids[:1, :21]], 1), ids[1:]])
    mask = padded != 0
    both = lm.generate(padded, attention_mask=mask.long(), max_new_tokens=12, do_sample=False)
    for row in range(2):
        alone = lm.generate(padded[row : row + 1, mask[row]], max_new_tokens=12, do_sample=False)
        assert torch.equal(both[row, 30:], alone[0, -12:])
    beams = lm.generate(ids, max_new_tokens=6, do_sample=False, num_beams=3)
    assert beams.shape == (2, 36)
    # saved and loaded, the model and its cache
    lm.save_pretrained(tmp_path / "model")
    again = SaccadeForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    assert torch.equal(again(ids).logits, whole)
    cache = lm(ids[:, :29], use_cache=True).past_key_values
    save_cache(tmp_path / "cache.safetensors", cache, lm)
    after = lm(ids[:, 29:], past_key_values=load_cache(tmp_path / "cache.safetensors", lm)).logits
    assert (after[:, 0] - whole[:, 29]).abs().max() < SAME


def test_layers_of_a_model():
    assert nats_layers(2, chunk=32) == ["nats-l(chunk=32)"] * 2
    assert [i for i, spec in enumerate(nats_layers(21, every=4)) if spec == "nats-l"] == [3, 7, 11, 15, 19]
    with pytest.raises(ValueError, match="at least 1 of each"):
        nats_layers(4, every=0)


@torch.no_grad()
def test_states_of_rows_with_other_choices_are_joined():
    mixer, x = layer(), tokens(37, b=3)
    apart = [mixer(x[row : row + 1, : 20 + 8 * row])[1] for row in range(3)]
    joined = MixerState.join(apart)
    y = mixer(x[:, :1], joined)[0]
    for row in range(3):
        assert (y[row] - mixer(x[row : row + 1, :1], apart[row])[0][0]).abs().max() < SAME


@pytest.mark.parametrize(("spec", "message"), [
    ("nats-l(chunk=0)", "at least 1 of each"), ("nats-l(inner='both')", "all, attention, delta"), ("nats-l(weights='k')", "q, x, none"),
    ("nats-l(sample='top')", "argmax, gumbel"), ("nats-l(split=3)", "can't be split into 3 attention heads"),
    ("nats-l(split=2, groups=3)", "can't make up 3 groups"),
])  # fmt: skip
def test_wrong_fields_are_refused(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        saccade.mixer(spec, dim=32, heads=4)
