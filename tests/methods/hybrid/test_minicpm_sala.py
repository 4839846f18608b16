"""minicpm-sala: open it is attention, the order of the past does not matter, first and last blocks are always read, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade
from saccade.core import TokenMixer
from saccade.methods import build_mixer
from saccade.methods.hybrid.minicpm_sala import PUBLISHED, minicpm_sala_layers
from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM
from saccade.parts.linear.slopes import alibi_slopes
from saccade.parts.window_blocks import choose_blocks

N, DIM = 100, 32
SMALL = "sparse=True, block=8, top=4, local=9, window=4, stride=2"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def layer(spec: str, kv_heads: int = 2) -> Any:
    torch.manual_seed(0)
    return saccade.mixer(spec, dim=DIM, heads=4, kv_heads=kv_heads).double()


def tokens(seed: int = 1, n: int = N, b: int = 2) -> Tensor:
    return torch.randn(b, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same_weights(source: TokenMixer, target: TokenMixer) -> None:
    target.load_state_dict(source.state_dict())


@pytest.mark.parametrize("fields", [f"{SMALL}, dense={N}", f"{SMALL.replace('top=4', 'top=13')}, dense=0"])
@torch.no_grad()
def test_dense_or_with_all_blocks_a_sparse_layer_is_gated_attention(fields: str):
    sala, softmax = layer(f"minicpm-sala({fields})"), layer("softmax(rotary=False, gate=True)")
    same_weights(softmax, sala)
    assert float((sala(tokens())[0] - softmax(tokens())[0]).abs().max()) < 1e-12
    # one more token than the dense length, and four blocks are not all
    closed = layer(f"minicpm-sala({SMALL}, dense={N - 1})")
    same_weights(softmax, closed)
    error = (closed(tokens())[0] - softmax(tokens())[0]).abs().amax((0, 2))
    assert float(error[:-1].max()) < 1e-12 and float(error[-1]) > 1e-4


@torch.no_grad()
def test_without_a_rotary_embedding_the_order_of_the_past_does_not_matter():
    order = torch.cat([torch.randperm(N - 1, generator=torch.Generator().manual_seed(0)), torch.tensor([N - 1])])
    for rotary, same in ((False, True), (True, False)):
        mixer = layer(f"minicpm-sala({SMALL}, dense={N}, rotary={rotary})")
        moved = float((mixer(tokens()[:, order])[0] - mixer(tokens())[0])[:, -1].abs().max())
        assert (moved < 1e-12) == same, moved


@torch.no_grad()
def test_a_lightning_layer_is_the_published_recurrence():
    mixer, x = layer("minicpm-sala"), tokens(b=1)
    torch.manual_seed(4)
    for name in ("q_norm", "k_norm"):
        getattr(mixer, name).weight.add_(0.3 * torch.randn(8))
    heads, d = 4, 8
    assert mixer.k_proj.weight.shape == (heads * d, DIM)  # as many key heads as query heads, though the shape has two

    def normed(x: Tensor, norm: Any) -> Tensor:
        x = x.unflatten(-1, (heads, d)).transpose(1, 2)
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight

    def turned(x: Tensor) -> Tensor:
        angle = torch.arange(N, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    q, k = turned(normed(mixer.q_proj(x), mixer.q_norm)), turned(normed(mixer.k_proj(x), mixer.k_norm))
    v = mixer.v_proj(x).unflatten(-1, (heads, d)).transpose(1, 2)
    decay = torch.exp(-alibi_slopes(heads).double())[:, None, None]
    state, outs = torch.zeros(1, heads, d, d, dtype=torch.float64), []
    for t in range(N):
        state = decay * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, None] @ state).squeeze(-2) * d**-0.5)
    read = torch.stack(outs, dim=2).transpose(1, 2).flatten(2)
    read = read * (read.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * mixer.normaliser.weight.flatten()
    truth = mixer.o_proj(read * mixer.out_gate.project(x).sigmoid())
    assert float((mixer(x)[0] - truth).abs().max()) < 1e-10
    sizes = {mixer(tokens(n=n))[1].nbytes for n in (10, 40, 90)}
    assert len(sizes) == 1  # a state of its own, as large at every length


@torch.no_grad()
def test_first_and_last_blocks_are_always_among_the_chosen_and_no_more_than_asked_for():
    mixer, x = layer(f"minicpm-sala({SMALL}, init=2, dense=0)".replace("top=4", "top=6")), tokens()
    call = mixer.whole(x)
    mask = mixer.mask(mixer.queries(x, call), mixer.keys(x, call)[0])
    chosen = []
    for i in range(N):
        blocks = {int(b) for b in (mask[0, 0, i].nonzero() // 8).flatten()}
        local = set(range(max(0, i - 8) // 8, i // 8 + 1))
        assert {b for b in (0, 1) if b <= i // 8} | local <= blocks and len(blocks) <= 6
        assert len(blocks) == min(6, i // 8 + 1)
        chosen.append(frozenset(blocks))
        # one set for the heads of a group
        assert torch.equal(mask[0, 0, i], mask[0, 1, i])
    assert len({blocks for i, blocks in enumerate(chosen) if i // 8 == 12}) > 1  # and what is found differs by query
    assert float((mixer(x)[0] - mixer.naive(x)).abs().max()) < 1e-12


def choice(q: Tensor, keys: Tensor, first: int, **fields: int) -> list[list[int]]:
    """The blocks of each query of one head."""
    windows = keys.unfold(0, fields["window"], fields["stride"]).mean(-1)
    blocks, counts = choose_blocks(q[None, None], windows[None, None], first, **fields)
    return [row[:n].tolist() for row, n in zip(blocks[0, 0], counts[0, 0], strict=True)]


def test_a_planted_key_is_found_and_a_window_across_an_edge_counts_for_both_blocks():
    fields = {"window": 4, "stride": 2, "block": 8, "top": 4, "init": 1, "local": 8}
    keys, q = torch.zeros(96, 4), torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    keys[43, 0] = 9.0  # block 5, windows 20 and 21, both inside it
    assert choice(q, keys, 95, **fields) == [[0, 1, 5, 11]]  # what is left goes to the earliest
    keys[43, 0], keys[47, 0] = 0.0, 9.0  # windows 22 (44 to 47) and 23 (46 to 49)
    assert choice(q, keys, 95, **fields) == [[0, 5, 6, 11]]
    # a window that ends behind the query does not count: 22 ends with 47
    assert choice(q.expand(2, 4), keys[:48], 46, **{**fields, "local": 1, "top": 3})[0] == [0, 1, 5]


def test_nothing_is_chosen_twice_or_from_the_future():
    torch.manual_seed(0)
    fields = {"window": 32, "stride": 16, "block": 64, "top": 6, "init": 1, "local": 128}
    keys, q = torch.randn(700, 8), torch.randn(500, 8)
    for i, blocks in enumerate(choice(q, keys, 200, **fields)):
        place = 200 + i
        assert len(set(blocks)) == len(blocks) == min(6, place // 64 + 1) and blocks == sorted(blocks) and blocks[-1] == place // 64


@torch.no_grad()
def test_what_32_layers_keep():
    specs = minicpm_sala_layers(32)
    assert [i for i, spec in enumerate(specs) if "sparse=True" in spec] == list(PUBLISHED)
    config = SaccadeConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, layers=specs, num_attention_heads=32, num_key_value_heads=2, head_dim=128
    )
    model = SaccadeForCausalLM(config).eval()
    for n in (24, 56):
        layers = model(torch.randint(3, 16, (1, n)), use_cache=True).past_key_values.layers
        tails = [layer.state.values["kv"].layer.tail for layer in layers if "kv" in layer.state.values]
        states = [layer.state.values["s"] for layer in layers if "s" in layer.state.values]
        assert sum(tail.keys.numel() + tail.values.numel() for tail in tails) == 8 * 2 * 2 * 128 * n
        assert sum(state.numel() for state in states) == 24 * 32 * 128 * 128


@torch.no_grad()
def test_window_means_are_kept_and_made_anew_where_tokens_are_taken_back():
    mixer, x = layer(f"minicpm-sala({SMALL}, dense=20)"), tokens()
    _, state = mixer(x)
    held = state.values["kv"].pooled
    assert held.shape[2] == (N - 4) // 2 + 1
    keys = mixer.keys(x, mixer.whole(x))[0]
    assert float((held[:, :, 7] - keys[:, :, 14:18].mean(2)).abs().max()) < 1e-12
    after = tokens(seed=7, n=3)
    expected = mixer(after, mixer(x[:, :-5])[1])[0]
    assert float((mixer(after, state.crop(5))[0] - expected).abs().max()) < 1e-12


@torch.no_grad()
def test_in_a_decoder_it_generates_takes_padding_and_opens_again(tmp_path: Path):
    torch.manual_seed(0)
    config = SaccadeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        layers=minicpm_sala_layers(3, block=4, top=3, local=4, window=4, stride=2, dense=9),
    )  # fmt: skip
    model = SaccadeForCausalLM(config).double().eval()
    ids = torch.randint(3, 64, (2, 23), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    wanted: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    both = model.generate(ids * mask, attention_mask=mask, **wanted)
    for row, start in enumerate((6, 0)):
        alone = model.generate(ids[row : row + 1, start:], **wanted)
        assert torch.equal(both[row, start:], alone[0])
        assert torch.equal(model(alone[:, :-1]).logits[0, -9:].argmax(-1), alone[0, -9:])
    model.save_pretrained(tmp_path)
    opened = SaccadeForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert opened.config.specs == config.specs and all(map(torch.equal, opened.parameters(), model.parameters()))
    # loaded weights lie elsewhere in memory: products may round otherwise
    assert float((opened(ids).logits - model(ids).logits).abs().max()) < 1e-12


def test_layers_are_listed_or_refused():
    assert [i for i, spec in enumerate(minicpm_sala_layers(12)) if "sparse" in spec] == [0, 6, 11]
    assert minicpm_sala_layers(2, sparse=[1], dense=0) == ["minicpm-sala(dense=0)", "minicpm-sala(dense=0, sparse=True)"]
    with pytest.raises(ValueError, match=r"sparse layers \[0, 5\] are not all among 4"):
        minicpm_sala_layers(4, sparse=[0, 5])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("norm='rms'", "norm='rms'"), ("block=0", "block=0"), ("dense=-1", "dense=-1"), ("stride=24", "let the stride divide the block"),
        ("window=8", "no window be shorter"), ("top=33", "can't hold the 34 blocks that init=1"), ("theta=0.0", "theta=0.0"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(fields: str, message: str):
    with pytest.raises(ValueError, match=message):
        build_mixer(f"minicpm-sala({fields})")
