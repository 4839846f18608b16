"""titans: the memory is the delta rule in its simplest form, and what each of the three joins reads of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saccade
from saccade.core import MixerState
from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM
from saccade.ops.scan import scan
from saccade.parts.linear.gates import heads_first


def layer(spec: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    made = saccade.mixer(spec, **{"dim": 16, "heads": 2, **sizes}).double()
    for p in made.parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    return made


def tokens(n: int, dim: int = 16) -> Tensor:
    return torch.randn(2, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# -- the memory ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_linear_memory_without_momentum_and_forgetting_is_the_delta_rule():
    """beta = 2 theta, from the learned start, with gradients at the newest weights."""
    made, x = layer("titans(form='lmm', depth=1, momentum=False, forget=False, chunk=1, max_step=0.5)"), tokens(30)
    q, k, v, rates, _ = made.memory.project(x, {})
    start = made.memory.first[0].expand(2, -1, -1, -1)
    out, end = scan(q.flatten(1, 2), k, v, beta=2 * rates.theta, initial_state=start, scale=1.0)
    y, state = made(x)
    assert isinstance(end, Tensor)
    assert error(y, made.memory.finish(out.unsqueeze(2), x)) < 1e-11
    assert error(state.values["weights"]["0"], end) < 1e-11
    assert set(state.values) == {"weights", "q_tail", "k_tail", "v_tail"}


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_gradients_at_older_weights_matter_less_the_smaller_the_steps(depth: int):
    x, apart = tokens(64), []
    for step in (1.0, 0.1, 0.01):
        fast, slow = (layer(f"titans(form='lmm', forget=False, depth={depth}, max_step={step}, chunk={chunk})") for chunk in (16, 1))
        still = layer(f"titans(form='lmm', forget=False, depth={depth}, max_step=1e-12, chunk=16)")
        apart.append(error(fast(x)[0], slow(x)[0]) / error(slow(x)[0], still(x)[0]))
    assert apart[0] > 0.1 and apart[1] < apart[0] / 3 and apart[2] < apart[1] / 5


@torch.no_grad()
def test_what_was_written_is_read_again():
    """A value written once under its key comes back, less so the more the memory forgets."""
    made = layer("titans(form='lmm', depth=1, conv=0, momentum=False, chunk=1, max_step=1.0)", heads=1, dim=8)
    made.memory.q_proj.weight.copy_(made.memory.k_proj.weight)
    made.memory.o_proj.weight.copy_(torch.eye(8))
    made.memory.rate_proj.weight.zero_()
    x, errors = tokens(2, 8)[:, :1], []
    for forget in (-20.0, -1.0, 1.0):
        made.memory.rate_proj.bias.copy_(torch.tensor([0.0, forget]))  # theta = 1 / 2: the delta rule at beta = 1
        value = F.silu(made.memory.v_proj(x))
        first = made.memory.recall(x, None, made.memory.begin(x).weights)[0]
        errors.append(error(made(x)[0], value) / error(first, value))
    assert errors[0] < 1e-6 < errors[1] < errors[2]


@pytest.mark.parametrize("form", ["mac", "mag", "mal", "lmm"])
@torch.no_grad()
def test_it_stays_finite_over_many_tokens_as_it_starts(form: str):
    torch.manual_seed(0)
    made = saccade.mixer(f"titans(form={form!r}, segment=64, window=64)", dim=32, heads=2)
    # the same few tokens again and again are the hardest for gradients at old weights
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1)).repeat(1, 100, 1)
    y, state = made(x)
    assert y.isfinite().all() and y[:, -64:].std() < 10
    memory = state.values if form == "lmm" else state.values["memory"]
    assert all(weight.abs().max() < 10 for weight in memory["weights"].values())


# -- the joins -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [0, 3])
@torch.no_grad()
def test_mac_with_an_empty_memory_is_attention_inside_segments(persistent: int):
    """Over P and the segment. What an empty memory recalls has key and value 0: it makes y smaller, which the norm of one head undoes."""
    made, x = layer(f"titans(segment=8, persistent={persistent}, gate='sigmoid')", heads=1), tokens(29)
    made.memory.o_proj.weight.zero_()
    made.attention_norm.eps = 1e-30
    attention, front = made.attention, made.front(x)
    outs = []
    for s in x.split(8, dim=1):
        n = s.shape[1]
        joined = torch.cat([front, s], dim=1)
        places = torch.cat([torch.arange(persistent), persistent + 8 + torch.arange(n)])[None]
        q, k = (attention.rotary(heads_first(one(joined), 1), places) for one in (attention.q_proj, attention.k_proj))
        mask = torch.ones(n, persistent + n, dtype=torch.bool).tril(persistent)
        y = F.scaled_dot_product_attention(q[:, :, persistent:], k, heads_first(attention.v_proj(joined), 1), attn_mask=mask)
        outs.append(attention.o_proj(y.squeeze(1)))
    y = torch.cat(outs, 1)
    normed = y / y.square().mean(-1, keepdim=True).sqrt() * made.attention_norm.weight
    assert error(made(x)[0], 0.5 * normed) < 1e-11


@torch.no_grad()
def test_mac_recalls_what_was_known_before_the_segment():
    """h of a token depends on earlier segments, and in its own segment on the token alone."""
    made, x = layer("titans(segment=8, conv=0, chunk=4)"), tokens(15)
    recalled = made(x)[1].values["memory_k"]
    for place, changed in ((3, range(7)), (8, [0]), (12, [4])):
        other = x.clone()
        other[:, place] += 1
        now = (made(other)[1].values["memory_k"] - recalled).abs().amax((0, 2, 3)) > 1e-9
        assert now.nonzero().flatten().tolist() == list(changed), place
    state = made(x)[1]
    held = made(x[:, :8])[1].values["memory"]["weights"]
    assert all(torch.equal(state.values["before"][name], held[name]) for name in held)


@torch.no_grad()
def test_mac_reads_what_it_has_just_written():
    """Of two tokens in one segment the gate of the second knows the first through the memory alone, where attention can't see it."""
    made, x = layer("titans(segment=8, persistent=2, conv=0)"), tokens(6)
    made.attention.q_proj.weight.zero_()
    calls: list[tuple[Tensor, Tensor]] = []
    made.memory.register_forward_hook(lambda _, given, out: calls.append((given[0], out[0])))
    made(x)
    y, m = calls[0]
    q = made.memory.ask(y, None)[0]
    still = made.memory.recall(y, None, made.memory.begin(y).weights)[0]
    assert q.shape[3] == 6 and error(m, still) > 1e-4
    first = made.memory(y[:, :3], {}, 0)[0]
    assert error(m[:, :3], first) < 1e-12


@pytest.mark.parametrize("form", ["mag", "mal"])
def test_the_memory_reaches_further_than_the_window(form: str):
    for step, reaches in ((0.1, True), (1e-300, False)):
        made = layer(f"titans(form={form!r}, window=4, persistent=2, conv=0, forget=False, max_step={step})")
        x = tokens(20).requires_grad_()
        far = torch.autograd.grad(made(x, keep=False)[0][:, -1].sum(), x)[0][:, :16].abs().max()
        assert bool(far > 1e-9) == reaches


@torch.no_grad()
def test_mag_and_mal_are_their_parts():
    for form in ("mag", "mal"):
        made, x = layer(f"titans(form={form!r}, window=4, persistent=2)"), tokens(20)
        joined = torch.cat([made.persistent.expand(2, -1, -1), x], dim=1)
        if form == "mag":
            y, m = made.attention(joined)[0][:, 2:], made.memory(x, {}, 0)[0]
            gate = F.rms_norm(m, (16,), made.memory_norm.weight, 1e-6)
            expected = F.rms_norm(y, (16,), made.attention_norm.weight, 1e-6) * F.silu(gate)
        else:
            expected = made.attention(made.memory(joined, {}, 0)[0])[0][:, 2:]
        assert made.attention.method.sinks == 2 and made.attention.method.window == 4
        assert error(made(x)[0], expected) < 1e-12


# -- trained ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_recall_beyond_the_segment_needs_the_memory():
    """Pairs of a key and a value in one segment, the keys alone in the next: attention never sees both."""
    torch.manual_seed(0)
    names, pairs, dim = 5, 2, 32
    made = saccade.mixer("titans(segment=2, chunk=2, persistent=2, conv=0, depth=1, max_step=0.5)", dim=dim, heads=2)
    table, head, norm = nn.Embedding(2 * names, dim), nn.Linear(dim, names), nn.RMSNorm(dim)
    optimiser = torch.optim.Adam([*made.parameters(), *table.parameters(), *head.parameters()], lr=0.01)
    draw = torch.Generator().manual_seed(1)

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        keys = torch.rand(rows, names, generator=draw).argsort(1)[:, :pairs]
        values = torch.randint(0, names, (rows, pairs), generator=draw)
        order = torch.rand(rows, pairs, generator=draw).argsort(1)
        return torch.cat([table(keys) + table(values + names), table(keys.gather(1, order))], 1), values.gather(1, order)

    for _ in range(110):
        x, wanted = batch(32)
        y = x + made(F.rms_norm(x, (dim,)), keep=False)[0]
        loss = F.cross_entropy(head(norm(y[:, pairs:])).flatten(0, 1), wanted.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimiser.step()
    with torch.no_grad():
        x, wanted = batch(256)
        given = F.rms_norm(x, (dim,))
        state = made(given[:, :pairs])[1]
        emptied = MixerState(state.position, {**state.values, "memory": made.memory.pack(made.memory.begin(given))})
        read = [x[:, pairs:] + made(given[:, pairs:], past)[0] for past in (state, emptied)]
        right = [float((head(norm(y)).argmax(-1) == wanted).float().mean()) for y in read]
    assert right[0] > 0.7 and right[1] < 0.4, right


def test_it_is_a_layer_of_a_language_model(tmp_path: Path):
    torch.manual_seed(0)
    forms = ["titans(segment=8, chunk=4)", "titans(form='mag', window=8)", "titans(form='mal', window=8)", "softmax"]
    made = SaccadeForCausalLM(SaccadeConfig(
        layers=forms, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        vocab_size=97, eos_token_id=None,
    )).eval()  # fmt: skip
    ids = torch.randint(3, 97, (2, 15), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    together = made.double().generate(ids, attention_mask=mask, **options)
    for row in range(2):
        alone = ids[row : row + 1, mask[row].bool()]
        for cached in (True, False):
            assert torch.equal(made.generate(alone, use_cache=cached, **options)[0, -6:], together[row, -6:])
    made.float().save_pretrained(tmp_path)
    assert error(SaccadeForCausalLM.from_pretrained(tmp_path)(ids).logits, made(ids).logits) == 0


def test_what_does_not_fit_is_refused():
    for fields in ("form='max'", "segment=0", "window=0", "persistent=-1", "gate='relu'", "theta=0", "depth=0", "loss='max'", "chunk=0"):
        with pytest.raises(ValueError, match=fields.split("=")[0]):
            saccade.mixer(f"titans({fields})", dim=16, heads=2)
