"""lt2: what a loop is, how far it sees, what its states are, and what carrying them adds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import saccade
from saccade.methods.hybrid.lt2 import LT2, LT2Mixer, inherit
from saccade.methods.stack import Stack
from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM, schedule

SAME = 1e-10


def layer(dim: int = 32, heads: int = 4, **fields) -> LT2Mixer:
    torch.manual_seed(0)
    made = saccade.mixer(LT2(**fields), dim=dim, heads=heads).double()
    assert isinstance(made, LT2Mixer)
    return made


def tokens(n: int, dim: int = 32) -> torch.Tensor:
    return torch.randn(2, n, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def test_one_loop_is_the_plain_stack_and_rho_of_zero_is_a_repeated_one():
    layers = ("kimi-linear(gate='token')", "softmax(window=8)")
    x = tokens(30)
    once, thrice = layer(layers=layers, loops=1, width=24), layer(layers=layers, loops=3, width=24, across=True)
    torch.manual_seed(0)
    plain = Stack(layers, dim=32, heads=4, width=24).double()
    assert (once(x)[0] - plain(x)[0]).abs().max() < SAME
    plain.load_state_dict(thrice.stack.state_dict(), strict=False)
    assert (thrice(x)[0] - plain(plain(plain(x)[0])[0])[0]).abs().max() < SAME
    thrice.stack.carry[1] = 0.5
    second = plain(plain(x)[0])[0] + 0.5 * plain(x)[0]
    assert (thrice(x)[0] - plain(second)[0]).abs().max() < SAME


@pytest.mark.parametrize(("window", "loops", "blocks"), [(3, 3, 2), (4, 2, 1), (2, 4, 2)])
def test_windows_reach_loops_times_blocks_times_their_width(window: int, loops: int, blocks: int):
    looped, x = layer(layers=(f"softmax(window={window})",) * blocks, loops=loops), tokens(30).requires_grad_()
    (grad,) = torch.autograd.grad(looped(x)[0][:, -1].square().sum(), x)
    reach = loops * blocks * (window - 1)
    seen = grad.abs().amax((0, 2)) > 0
    assert seen.nonzero().flatten().tolist() == [*range(29 - reach, 30)]


@torch.no_grad()
def test_every_loop_and_block_has_a_state_of_its_own():
    looped, x = layer(layers=("deltanet", "softmax"), loops=3), tokens(30)
    state = looped(x)[1]
    assert len(state.values) == 6
    sums = [state.values[str(i)]["values"]["s"] for i in (0, 2, 4)]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(sums))
    # one state for all loops would mix them: the step after it is then another
    after, mixed = tokens(1), state.copy()
    mixed.values["2"] = mixed.values["0"]
    assert (looped(after, mixed)[0] - looped(after, state)[0]).abs().max() > 1e-4


@torch.no_grad()
def test_full_in_the_first_loop_and_windows_in_later_ones():
    looped, x = layer(layers=("softmax",), loops=2, later_window=4, width=0), tokens(30)
    block = looped.stack.blocks[0]
    narrow = saccade.mixer("softmax(window=4)", dim=32, heads=4).double()
    narrow.load_state_dict(block.mixer.state_dict())
    middle = x + block.mixer.naive(block.norm(x))
    assert (looped(x)[0] - (middle + narrow.naive(block.norm(middle)))).abs().max() < SAME
    kept = looped(x)[1].values
    assert "kv" in kept["0"]["values"] and kept["1"]["values"]["k"].shape[1] == 3


@torch.no_grad()
def test_carried_states_are_corrected_once_for_each_loop():
    """After one token a state of the delta rule has rank 1; carried through T loops, rank T."""
    for carry, rank in ((False, 1), (True, 4)):
        looped = layer(layers=("deltanet(conv=0)",), loops=4, carry_state=carry)
        state = looped(tokens(1))[1]
        assert torch.linalg.matrix_rank(state.values["3"]["values"]["s"]).flatten().tolist() == [rank] * 8
    # and it is the product of T steps of the rule on one state, token by token
    looped, x = layer(layers=("deltanet(conv=0)",), loops=2, carry_state=True, width=0), tokens(6)
    block, sums, outs = looped.stack.blocks[0], None, []
    for t in range(6):
        h = x[:, t : t + 1]
        for _ in range(2):
            y, kept = block.mixer.mix(block.norm(h), {} if sums is None else {"s": sums}, looped.whole(h).__class__(
                positions=torch.full((2, 1), t), start=torch.full((2,), t)
            ))  # fmt: skip
            h, sums = h + y, kept["s"]
        outs.append(h)
    assert (looped(x)[0] - torch.cat(outs, 1)).abs().max() < SAME


def tracked(loops: int, steps: int = 250, length: int = 6) -> float:
    """Accuracy at naming the product so far of permutations of three things, after training on such products."""
    perms = list(itertools.permutations(range(3)))
    table = torch.tensor([[perms.index(tuple(a[i] for i in b)) for b in perms] for a in perms])
    source = torch.Generator().manual_seed(1)

    def drawn(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randint(0, 6, (rows, length), generator=source)
        products = [x[:, 0]]
        for t in range(1, length):
            products.append(table[products[-1], x[:, t]])
        return x, torch.stack(products, 1)

    torch.manual_seed(0)
    spec = LT2(layers=("deltanet(conv=0, negative=True)",), loops=loops, width=64, carry_state=True)
    looped, table_in, norm, out = saccade.mixer(spec, dim=32, heads=2), nn.Embedding(6, 32), nn.RMSNorm(32), nn.Linear(32, 6)
    net = nn.ModuleList([table_in, looped, norm, out])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 20, (steps - step) / (steps / 2))
        x, y = drawn(64)
        loss = nn.functional.cross_entropy(out(norm(looped(table_in(x), keep=False)[0])).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    x, y = drawn(512)
    with torch.no_grad():
        return float((out(norm(looped(table_in(x), keep=False)[0])).argmax(-1) == y).float().mean())


@pytest.mark.slow
def test_more_loops_follow_permutations_that_one_does_not():
    """One delta step is a reflection, and a turn of three things is two of them: states are carried from loop to loop."""
    assert tracked(3) > 0.95 > 0.8 > tracked(1)


@torch.no_grad()
def test_a_looped_model_decodes_as_it_reads():
    torch.manual_seed(2)
    lm = SaccadeForCausalLM(SaccadeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, initializer_range=0.2, loops=3,
        layers=schedule("4:1", 5, "kimi-linear(gate='token')", "softmax(gate=True)"),
    )).double().eval()  # fmt: skip
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(4))
    whole, out = lm(ids).logits, lm(ids[:, :11], use_cache=True)
    assert len(out.past_key_values.layers) == 15
    steps = [out.logits]
    for t in range(11, 20):
        out = lm(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() < SAME


@torch.no_grad()
def test_a_linear_stack_inherits_a_full_one():
    full, linear = layer(layers=("softmax",) * 2), layer(layers=("kimi-linear", "softmax"))
    for x in full.parameters():
        x.add_(0.1 * torch.randn_like(x))
    own = inherit(linear, full)
    assert all(name.startswith("stack.blocks.0.mixer.") and "_proj" not in name for name in own) and own
    theirs = full.state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in linear.state_dict().items() if name not in own)


@pytest.mark.parametrize(("fields", "message"), [
    ({"layers": ()}, "at least 1 layer"), ({"loops": 0}, "1 loop"), ({"later_window": 0}, "at least 1 token"),
    ({"layers": ("infsa",)}, "bidirectional layer"),
])  # fmt: skip
def test_wrong_fields_are_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        layer(**fields)
