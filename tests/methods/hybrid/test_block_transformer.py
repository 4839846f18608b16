"""block-transformer: what crosses the border between blocks, when, and how much each half keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saccade
from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM
from saccade.parts.linear.block_embedder import BlockEmbedder

SMALL = "block_layers=2, token_layers=1, width=8"


def layer(fields: str = "shift=0", **sizes: Any) -> Any:
    torch.manual_seed(0)
    made = saccade.mixer(f"block-transformer({SMALL}, {fields})", **{"dim": 16, "heads": 2, **sizes}).double()
    for p in made.parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    return made


def tokens(n: int, b: int = 2) -> Tensor:
    return torch.randn(b, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# -- what sees what --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("join", ["prefix", "add", "cross"])
@pytest.mark.parametrize("embedder", ["concat", "sum", "cls"])
@torch.no_grad()
def test_blocks_meet_in_their_contexts_alone(join: str, embedder: str):
    """With the context after block 3 as it was, no token before block 4 matters to it; block 4's own tokens do."""
    made, x = layer(f"shift=0, join={join!r}, embedder={embedder!r}, encoder_layers=1"), tokens(24)
    given, plain = made.contexts, made(x)[0]
    recorded: list[Tensor] = []

    def recording(blocks: Tensor, states: Any, keep: bool) -> tuple[Tensor, Any]:
        c, states = given(blocks, states, keep)
        recorded.append(c)
        return c, states

    def patched(blocks: Tensor, states: Any, keep: bool) -> tuple[Tensor, Any]:
        c, states = given(blocks, states, keep)
        # after the padding in front and four blocks
        return torch.cat([c[:, :4], recorded[0][:, 4:]], 1), states

    made.contexts = recording
    made(x)
    other = x.clone()
    other[:, :16] = tokens(40)[:, 24:]
    made.contexts = patched
    # the output of a block's last token is the next block's: 15, 16, 17, 18
    assert error(made(other)[0][:, 15:19], plain[:, 15:19]) < 1e-12
    assert error(made(other)[0][:, 11:15], plain[:, 11:15]) > 1e-3
    made.contexts = given
    assert error(made(other)[0][:, 15:19], plain[:, 15:19]) > 1e-3
    later = x.clone()
    later[:, 16] += 1
    changed = (made(later)[0] - plain).abs().amax((0, 2)) > 1e-9
    assert changed.tolist() == [t >= 16 for t in range(24)]


@torch.no_grad()
def test_a_context_has_seen_all_of_its_blocks_and_no_token_after():
    made, x = layer(), tokens(20)
    y = made(x)[0]
    for t in range(16):
        other = x.clone()
        other[:, t] += 1
        changed = ((made(other)[0] - y).abs().amax((0, 2)) > 1e-9).nonzero().flatten().tolist()
        # in its own block from itself on, and everywhere from the block's last token on
        assert changed == list(range(t, 20)), t
    # the token half alone stays inside blocks: without contexts nothing passes on
    made.decoder.project.weight.zero_()
    other = x.clone()
    other[:, 5] += 1
    assert ((made(other)[0] - made(x)[0]).abs().amax((0, 2)) > 1e-9).nonzero().flatten().tolist() == [5, 6]


@torch.no_grad()
def test_blocks_of_one_token_are_two_stacks_the_upper_of_them_for_each_token():
    made, x = layer("length=1, prefix=1, shift=0"), tokens(12)
    padded = torch.cat([made.pad.expand(2, 1, -1), x], dim=1)
    h = padded @ made.embedder.project.weight.mT
    c = F.rms_norm(made.blocks(h)[0], (16,), made.norm.weight, 1e-6)[:, 1:]
    rows = (c @ made.decoder.project.weight.mT).flatten(0, 1).unsqueeze(1)
    assert error(made(x)[0], made.decoder.stack(rows)[0].unflatten(0, (2, 12)).squeeze(2)) < 1e-12


@torch.no_grad()
def test_the_halves_count_positions_apart():
    """The lower half turns keys by the numbers of blocks, the upper by places in the run, wherever the block stands."""
    made, x = layer(), tokens(16)
    seen: list[Tensor] = []
    for stack in (made.blocks, made.decoder.stack):
        stack.blocks[0].mixer.rotary.register_forward_hook(lambda _, given, out: seen.append(given[1]))
    made(x)
    # queries and keys of: the padding and four blocks, the first block's run, three runs of full blocks for each row, the last run
    expected = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1]]
    assert [x[0].tolist() for x in seen[::2]] == expected
    assert [len(x) for x in seen[::2]] == [2, 2, 6, 2]


# -- step by step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1, 3])
@torch.no_grad()
def test_decoding_keeps_one_entry_a_block_below_and_a_run_above(shift: int):
    made, x = layer(f"shift={shift}, prefix=2"), tokens(70)
    whole = made(x)[0]
    y, state = made(x[:, :30])
    outs, sizes = [y], set()
    for t in range(30, 70):
        y, state = made(x[:, t : t + 1], state)
        outs.append(y)
        store = state.values["blocks"]["0"]["values"]["kv"]
        assert store.layer.tail.n == 1 + (t + 1 + shift) // 4
        run = state.values["run"]["0"]
        assert int(run["position"][0]) == 2 + (t + 1 + shift) % 4
        sizes.add(sum(one.numel() for one in run["values"].values()))
    assert error(torch.cat(outs, 1), whole) < 1e-11
    # 2 + 3 places of a run, less the newest, in keys and values of 2 rows
    assert sizes == {2 * 4 * 16 * 2}


@torch.no_grad()
def test_keys_and_values_of_the_lower_half_are_a_lth_of_a_plain_decoder_s():
    plain = saccade.mixer("softmax", dim=16, heads=2).double()
    for length in (2, 4, 8):
        _, state = layer(f"length={length}, shift=0")(tokens(400))
        tails = [one["values"]["kv"].layer.tail for one in state.values["blocks"].values()]
        full = plain(tokens(400))[1].values["kv"].layer.tail
        # and the block of padding in front
        assert all(abs(tail.keys.numel() / full.keys.numel() - 1 / length) < 1 / 300 for tail in tails)


@torch.no_grad()
def test_rows_whose_blocks_end_at_different_steps_gather_no_padding():
    made, x = layer(), tokens(60, b=3)
    valid = torch.ones(3, 20, dtype=torch.bool)
    valid[0, :1], valid[1, :6] = False, False
    _, state = made(x[:, :20], valid=valid)
    for t in range(20, 60):
        y, state = made(x[:, t : t + 1], state)
    assert state.values["blocks"]["0"]["values"]["kv"].layer.tail.n == 1 + 60 // 4
    assert error(y[1], made(x[1:2, 6:])[0][0, -1:]) < 1e-11


@torch.no_grad()
def test_a_prompt_can_leave_out_all_but_its_last_block():
    made, x = layer().eval(), tokens(23)
    lazy = layer("shift=0, skip_prompt=True").eval()
    runs: list[int] = []
    lazy.decoder.stack.register_forward_hook(lambda _, given, out: runs.append(given[0].shape[0] * given[0].shape[1]))
    whole, (y, state) = made(x)[0], lazy(x[:, :18])
    assert runs == [2 * 4], "the front and the two tokens after the last full block"
    assert not y[:, :15].any() and error(y[:, 15:], whole[:, 15:18]) < 1e-12
    for t in range(18, 23):
        y, state = lazy(x[:, t : t + 1], state)
        assert error(y[:, 0], whole[:, t]) < 1e-12
    assert error(lazy(x, keep=False)[0], whole) < 1e-12 and error(lazy.train()(x)[0], whole) < 1e-12


# -- training --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_padding_in_front_is_drawn_in_training_alone():
    made, x = layer("shift='random'"), tokens(15)
    fixed = [layer(f"shift={shift}")(x)[0] for shift in range(4)]
    found = set()
    for _ in range(30):
        y, state = made(x)
        shift = int(state.values["shift"][0])
        assert error(y, fixed[shift]) < 1e-12
        found.add(shift)
    assert found == {0, 1, 2, 3}
    made.eval()
    assert all(error(made(x)[0], fixed[0]) < 1e-12 for _ in range(5))


@torch.no_grad()
def test_rows_with_different_padding_in_front_go_on_together():
    x, made = tokens(24), layer()
    states = [layer(f"shift={shift}")(x[row : row + 1, :13])[1] for row, shift in ((0, 1), (1, 2))]
    y = made(x[:, 13:], type(states[0]).join(states))[0]
    for row, shift in ((0, 1), (1, 2)):
        assert error(y[row], layer(f"shift={shift}")(x[row : row + 1])[0][0, 13:]) < 1e-11


def test_it_learns_to_repeat_what_stood_two_blocks_before():
    """Blocks A B A B A B: the upper half alone sees none of it, the lower must look back, and one context must hold a block."""
    torch.manual_seed(0)
    names, dim = 6, 32
    made = saccade.mixer("block-transformer(length=2, block_layers=1, token_layers=1, width=64, shift=0)", dim=dim, heads=4)
    table, head, norm = nn.Embedding(names, dim), nn.Linear(dim, names), nn.RMSNorm(dim)
    optimiser = torch.optim.Adam([*made.parameters(), *table.parameters(), *head.parameters()], lr=0.02)
    draw = torch.Generator().manual_seed(1)

    def logits(ids: Tensor) -> Tensor:
        return head(norm(made(F.rms_norm(table(ids), (dim,)), keep=False)[0]))[:, 3:-1]

    for _ in range(60):
        ids = torch.randint(names, (32, 4), generator=draw).repeat(1, 3)
        loss = F.cross_entropy(logits(ids).flatten(0, 1), ids[:, 4:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        ids = torch.randint(names, (256, 4), generator=draw).repeat(1, 3)
        right = float((logits(ids).argmax(-1) == ids[:, 4:]).float().mean())
        made.decoder.project.weight.zero_()
        blind = float((logits(ids).argmax(-1) == ids[:, 4:]).float().mean())
    assert right > 0.9 and blind < 0.35, (right, blind)


def test_it_is_a_whole_language_model_as_one_layer(tmp_path: Path):
    torch.manual_seed(0)
    spec = "block-transformer(block_layers=('softmax', 'deltanet'), token_layers='softmax', width=24)"
    made = SaccadeForCausalLM(SaccadeConfig(
        layers=[spec], hidden_size=16, intermediate_size=0, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        vocab_size=97, eos_token_id=None,
    )).eval()  # fmt: skip
    ids = torch.randint(3, 97, (2, 21), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    together = made.double().generate(ids, attention_mask=mask, **options)
    for row in range(2):
        alone = ids[row : row + 1, mask[row].bool()]
        for cached in (True, False):
            assert torch.equal(made.generate(alone, use_cache=cached, **options)[0, -10:], together[row, -10:])
    lazy = SaccadeForCausalLM(SaccadeConfig(**{**made.config.to_dict(), "layers": [spec.replace("24)", "24, skip_prompt=True)")]})).eval()
    lazy.load_state_dict(made.state_dict())
    assert torch.equal(lazy.double().generate(ids, attention_mask=mask, **options), together)
    made.float().save_pretrained(tmp_path)
    assert error(SaccadeForCausalLM.from_pretrained(tmp_path)(ids).logits, made(ids).logits) == 0
    getattr(made.train(), "activation_checkpointing_enable", made.gradient_checkpointing_enable)()
    made(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


# -- the embedders ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_the_embedders_know_of_a_block():
    x = tokens(4)[:, None]
    turned = x.flip(2)
    for kind, ordered in (("concat", True), ("sum", False), ("cls", True)):
        torch.manual_seed(0)
        made = BlockEmbedder(layer().shape, 4, kind, layers=1, width=8).double()
        assert made(x).shape == (2, 1, 16)
        assert (error(made(x), made(turned)) > 1e-6) == ordered
        for t in range(4):
            other = x.clone()
            other[:, :, t] += 1
            change = (made(other) - made(x)).abs().amax((0, 1)) > 1e-9
            assert change.nonzero().flatten().tolist() == (list(range(4 * t, 4 * t + 4)) if kind == "concat" else list(range(16)))


def test_what_does_not_fit_is_refused():
    for fields in (
        "length=0", "block_layers=()", "token_layers=0", "embedder='max'", "join='max'", "prefix=0", "encoder_layers=0", "width=-1",
        "shift=4", "shift='none'",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=fields.split("=")[0]):
            saccade.mixer(f"block-transformer({fields})", dim=16, heads=2)
    with pytest.raises(ValueError, match="can't be split among 3 tokens"):
        saccade.mixer("block-transformer(length=3)", dim=16, heads=2)
    with pytest.raises(ValueError, match="bidirectional layer"):
        saccade.mixer("block-transformer(token_layers=('efficient-attention(bidirectional=True)',))", dim=16, heads=2)
