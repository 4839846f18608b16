"""blalm: the mLSTM's three forms, its floor, the two ends of the gate, and Muon against AdamW."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM
from saccade.ops.scan import scan
from saccade.parts.linear import partial_softmax
from saccade.train.muon import Muon

SAME = 1e-10


def layer(spec: str, **sizes):
    torch.manual_seed(0)
    return saccade.mixer(spec, **{"dim": 32, "heads": 4, **sizes}).double()


def tokens(n: int = 40) -> torch.Tensor:
    return torch.randn(2, n, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def memory(mlstm, x):
    """h before the output gate and the norm of heads, and what it is made of."""
    call = mlstm.whole(x)
    q, k, v, _ = mlstm.project(x, {}, call)
    write, forget = mlstm.gate.project(x).mT.unflatten(1, (2, 4)).unbind(1)
    return q, k, v, write, torch.nn.functional.logsigmoid(forget)


def finished(mlstm, h, x):
    opened = h * mlstm.open_proj(x).unflatten(-1, (4, 8)).transpose(1, 2).sigmoid()
    normed = opened * (opened.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return mlstm.o_proj(normed.transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("loud", [1.0, 30.0])
def test_the_recurrence_and_the_matrix_of_weights_are_one(loud: float):
    """The card's recurrence, step by step, and its parallel form, both written out, against the layer; also with large gates."""
    mlstm, x = layer("blalm(join='none')"), tokens()
    mlstm.gate.project.weight *= loud
    q, k, v, write, forget = memory(mlstm, x)
    m = torch.full((2, 4), -torch.inf, dtype=torch.float64)
    c, n, steps = torch.zeros(2, 4, 8, 8, dtype=torch.float64), torch.zeros(2, 4, 8, dtype=torch.float64), []
    for t in range(40):
        new = torch.maximum(forget[..., t] + m, write[..., t])
        i, f = torch.exp(write[..., t] - new), torch.exp(forget[..., t] + m - new)
        c = f[..., None, None] * c + i[..., None, None] * v[:, :, t, :, None] * k[:, :, t, None] / 8**0.5
        n, m = f[..., None] * n + i[..., None] * k[:, :, t] / 8**0.5, new
        under = torch.maximum((n * q[:, :, t]).sum(-1).abs(), (-m).exp())
        steps.append((c @ q[:, :, t, :, None]).squeeze(-1) / under[..., None])
    total = forget.cumsum(-1)
    d = (total[..., :, None] - total[..., None, :] + write[..., None, :]).masked_fill(~torch.ones(40, 40).tril().bool(), -torch.inf)
    top = d.amax(-1, keepdim=True)
    weights = q @ k.mT / 8**0.5 * (d - top).exp()
    parallel = weights / torch.maximum(weights.sum(-1, keepdim=True).abs(), (-top).exp()) @ v
    assert (torch.stack(steps, 2) - parallel).abs().max() < SAME
    assert (mlstm(x)[0] - finished(mlstm, parallel, x)).abs().max() < SAME


@torch.no_grad()
def test_open_forget_gates_and_equal_input_gates_give_plain_linear_attention():
    """In the numerator; so the layer is that divided by |q . sum k| or 1 (times the scale)."""
    mlstm, x = layer("blalm(join='none')"), tokens()
    mlstm.gate.project.weight.zero_()
    mlstm.gate.project.bias.copy_(torch.tensor([0.0] * 4 + [50.0] * 4))
    q, k, v, _, _ = memory(mlstm, x)
    plain = scan(q, k, v)[0]
    total = scan(q, k, torch.ones_like(v[..., :1]))[0]
    assert (mlstm(x)[0] - finished(mlstm, plain / total.abs().clamp(min=1.0), x)).abs().max() < 1e-9


@torch.no_grad()
def test_the_floor_is_one_before_the_maximum_is_taken_off():
    """With very small input gates |q . n| is far under the floor, and the output is the sum itself."""
    mlstm, x = layer("blalm(join='none')"), tokens()
    mlstm.gate.project.weight.zero_()
    mlstm.gate.project.bias.copy_(torch.tensor([-12.0] * 4 + [50.0] * 4))
    q, k, v, _, _ = memory(mlstm, x)
    plain = scan(q, k, v * torch.exp(torch.tensor(-12.0, dtype=torch.float64)))[0]
    call = mlstm.whole(x)
    seen = []
    mlstm.head_norm.after = lambda out, call, level: seen.append(out) or out
    mlstm.remember(x, q, k, v, {}, call, lambda *given, **options: scan(*given, **options))
    opened = plain * mlstm.open_proj(x).unflatten(-1, (4, 8)).transpose(1, 2).sigmoid()
    assert (seen[0] - opened).abs().max() < 1e-9 * opened.abs().max()


@torch.no_grad()
def test_the_window_reads_a_convolution_s_output_as_it_lies_in_memory():
    """Short texts, whose blocks are views: channels of a convolution do not lie side by side."""
    mlstm, x = layer("blalm(window=16)"), tokens(10)
    q, _, _, _ = mlstm.project(x, {}, mlstm.whole(x))
    assert q.stride(-1) != 1
    assert (mlstm(x)[0] - mlstm.naive(x)).abs().max() < SAME


@torch.no_grad()
def test_a_saturated_gate_gives_each_branch_alone():
    x = tokens()
    for spec in ("blalm(window=8)", "blalm(window=8, hedgehog=True)"):
        both, alone = layer(spec), layer(spec.replace("window=8", "join='none'"))
        alone.load_state_dict(both.state_dict(), strict=False)
        both.join_proj.weight.zero_()
        both.join_proj.bias.fill_(100.0)
        assert (both(x)[0] - alone(x)[0]).abs().max() < SAME
        both.join_proj.bias.fill_(-100.0)
        q, k, v, _ = both.project(x, {}, both.whole(x))
        band = torch.ones(40, 40).tril().triu(-7).bool()
        window = partial_softmax(q, k, v, band).out
        assert (both(x)[0] - both.o_proj(window.transpose(1, 2).flatten(2))).abs().max() < SAME
    added = layer("blalm(window=8, join='add')")
    added.join_proj.weight.zero_()
    added.join_proj.bias.fill_(-100.0)
    alone = layer("blalm(join='none')")
    alone.load_state_dict(added.state_dict(), strict=False)
    assert (added(x)[0] - alone(x)[0]).abs().max() < SAME


def test_the_hedgehog_map_has_two_softmaxes_a_head():
    layered, x = layer("blalm(hedgehog=True)"), tokens()
    call = layered.whole(x)
    q, k, _, _ = layered.project(x, {}, call)
    mapped, _ = layered.features(q, k, call)
    assert mapped.shape[-1] == 16 and mapped.min() > 0
    assert torch.allclose(mapped[..., :8].sum(-1), torch.ones_like(mapped[..., 0]), atol=1e-9)
    assert torch.allclose(mapped[..., 8:], (-q).softmax(-1), atol=1e-9)


def texts(source: torch.Generator) -> torch.Tensor:
    """Texts `(8, 48)` in which the two letters before decide on the next, by a fixed table, in nine cases of ten."""
    table = torch.randint(3, 19, (16, 16), generator=torch.Generator().manual_seed(5))
    ids = torch.randint(3, 19, (8, 48), generator=source)
    follows = torch.rand(8, 48, generator=source) < 0.9
    for t in range(2, 48):
        ids[:, t] = torch.where(follows[:, t], table[ids[:, t - 2] - 3, ids[:, t - 1] - 3], ids[:, t])
    return ids


def trained(optimizer: str, rate: float, steps: int = 80) -> float:
    """Mean loss over the last ten steps."""
    torch.manual_seed(2)
    model = SaccadeForCausalLM(SaccadeConfig(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_attention_heads=2, layers=["blalm(window=8)"] * 2,
    ))  # fmt: skip
    matrices = [p for p in model.model.stack.parameters() if p.ndim == 2 and min(p.shape) > 4]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    if optimizer == "muon":
        ways: list[torch.optim.Optimizer] = [Muon(matrices, lr=rate, weight_decay=0.0), torch.optim.AdamW(others, lr=rate)]
    else:
        ways = [torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)]
    source, losses = torch.Generator().manual_seed(3), []
    for step in range(steps):
        ids = texts(source)
        loss = model(ids, labels=ids, use_cache=False).loss
        for way in ways:
            for group in way.param_groups:
                group["lr"] = rate * min(1.0, (steps - step) / (steps / 2))
            way.zero_grad()
        loss.backward()
        for way in ways:
            way.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


@pytest.mark.slow
def test_muon_reaches_a_lower_loss_than_adamw_at_the_best_rate_of_each():
    """The same tokens and steps; every rate of a grid for both."""
    rates = (3e-3, 1e-2, 3e-2)
    best = {name: min(trained(name, rate) for rate in rates) for name in ("muon", "adamw")}
    assert best["muon"] < best["adamw"], best


@pytest.mark.parametrize(("spec", "message"), [
    ("blalm(window=0)", "at least 1 token"), ("blalm(conv=-1)", "width in tokens"), ("blalm(join='both')", "is not 'gate', 'add'"),
])  # fmt: skip
def test_wrong_fields_are_refused(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        saccade.mixer(spec, dim=32, heads=4)
