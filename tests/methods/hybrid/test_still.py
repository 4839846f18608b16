"""still: all kept is softmax, every pair is read once, the map keeps lengths, planted tokens stay, and what the selection covers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade
from saccade.core import TokenMixer
from saccade.methods import build_mixer
from saccade.methods.hybrid import still
from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM
from saccade.parts.linear.norm_map import NormPreserving
from saccade.parts.linear.self_saliency import most_salient, self_saliency

N, DIM = 90, 32


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def layer(spec: str, kv_heads: int = 2) -> TokenMixer:
    torch.manual_seed(0)
    return saccade.mixer(spec, dim=DIM, heads=4, kv_heads=kv_heads).double()


def tokens(seed: int = 1, n: int = N, b: int = 2) -> Tensor:
    return torch.randn(b, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scaled_logits(mixer: Any, x: Tensor) -> Tensor:
    call = mixer.whole(x)
    q, k = mixer.queries(x, call), mixer.keys(x, call)[0].repeat_interleave(mixer.heads // mixer.kv_heads, dim=1)
    return q @ k.mT * q.shape[-1] ** -0.5


@torch.no_grad()
def test_all_tokens_kept_is_softmax():
    teacher, student = layer("softmax"), layer("still(chunk=8, kept=8)")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(student, name).load_state_dict(getattr(teacher, name).state_dict())
    truth = teacher(tokens())[0]
    # the denominator is at least 1, so that its eps takes at most a millionth
    assert float((student(tokens())[0] - truth).abs().max()) <= 1e-6 * float(truth.abs().max())
    student.kept = 7  # pyright: ignore
    late = (student(tokens())[0] - truth).abs().amax((0, 2))
    assert float(late[:16].max()) <= 1e-6 and float(late[16:].max()) > 1e-4


@pytest.mark.parametrize(("chunk", "kept"), [(8, 2), (8, 0), (5, 5), (1, 0), (16, 3)])
@torch.no_grad()
def test_every_visible_pair_is_read_once_and_each_closed_chunk_leaves_so_many_exact(chunk: int, kept: int):
    mixer: Any = layer(f"still(chunk={chunk}, kept={kept})")
    exact, linear = mixer.coverage(scaled_logits(mixer, tokens()))
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    assert not bool((exact & linear).any()) and torch.equal((exact | linear), causal.expand_as(exact))
    for i in range(N):
        for c in range(i // chunk + 1):
            inside = exact[..., i, c * chunk : (c + 1) * chunk].sum(-1)
            # the own chunk up to the query, the one before it whole, of those further back the salient ones
            wanted = kept if i // chunk - c >= 2 else min(i + 1, (c + 1) * chunk) - c * chunk
            assert bool((inside == wanted).all()), (i, c)
    # a token that stayed exact stays so for all that come
    assert bool((exact[:, :, chunk * 2 - 1 + chunk :, :chunk] == exact[:, :, -1:, :chunk]).all())


@torch.no_grad()
def test_the_map_keeps_lengths_and_turns_directions():
    torch.manual_seed(3)
    made = NormPreserving(4, 8).double()
    made.weight.data += 0.3 * torch.randn_like(made.weight)
    x = torch.randn(2, 4, 20, 8, dtype=torch.float64) * torch.logspace(-2, 2, 20, dtype=torch.float64)[:, None]
    turned = made.turned(x)
    assert float((turned.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max()) < 1e-12
    # what W does to the mirror image, with the length put back
    u = made.mirror / made.mirror.norm(dim=-1, keepdim=True)
    house = torch.eye(8) - 2 * u.mT @ u
    y = (made.weight @ house @ x.mT).mT
    assert float((torch.nn.functional.cosine_similarity(y, turned, dim=-1) - 1).abs().max()) < 1e-12
    longer = made(10 * x)
    assert float((longer - made(x)).abs().amax((0, 1, 3))[10]) > 0.05  # long queries are peaked, which a map of directions alone loses
    assert made(x).shape[-1] == made.width(8) == 16 and float(made(1e3 * x).min()) >= 1e-12


@torch.no_grad()
def test_saliency_is_the_divergence_of_attention_with_and_without_the_own_key():
    size = 16
    logits = 2 * torch.randn(200, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = torch.zeros(200, size, dtype=torch.bool)
    own[:, -1] = True
    found = self_saliency(logits, own, size)
    # the others keep their proportions, so that only the own weight p matters: p log(p l) + (1 - p) log(1 - p)
    p = logits.softmax(-1)[:, -1]
    assert float((found - (p * (p * size).log() + (1 - p) * (1 - p).log())).abs().max()) < 1e-5
    high = p > 1 / (size + 1)
    assert torch.equal(found[high].argsort(), p[high].argsort())
    alone = torch.full((1, size), float("-inf"), dtype=torch.float64)
    alone[0, -1] = 3.0
    assert float(self_saliency(alone, own[:1], size)) == pytest.approx(math.log(size), abs=1e-6) and float(found.max()) < math.log(size)


def test_among_equals_the_earlier_token_is_chosen():
    assert most_salient(torch.tensor([1.0, 3.0, 3.0, 1.0, 3.0]), 2).tolist() == [1, 2]
    assert most_salient(torch.tensor([1.0, 3.0, 2.0, 1.0, 1.0]), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("place", [9, 16, 35])
@torch.no_grad()
def test_a_planted_token_that_attends_to_itself_stays_exact(place: int):
    mixer: Any = layer("still(chunk=8, kept=1, rotary=False)", kv_heads=4)
    mixer.k_proj.weight.copy_(mixer.q_proj.weight)
    x = 0.2 * tokens(b=1)
    x[:, place] *= 40.0  # its product with itself is far above that with others
    exact, _ = mixer.coverage(scaled_logits(mixer, x))
    assert bool(exact[:, :, place // 8 * 8 + 16 :, place].all())
    _, state = mixer(x)
    key = mixer.keys(x, mixer.whole(x))[0][:, :, place]
    held = state.values["salient"].layer.tail.keys[:, :, place // 8]
    assert torch.equal(held, key)


@torch.no_grad()
def test_groups_of_chunks_equal_the_definition_however_many_go_together(monkeypatch: pytest.MonkeyPatch):
    mixer, x = layer("still(chunk=4, kept=1)"), tokens()
    truth = mixer.naive(x)
    for together in (4, 12, 64, 1024):
        monkeypatch.setattr(still, "AT_ONCE", together)
        assert float((mixer(x)[0] - truth).abs().max()) < 1e-12, together
    ranges = [list(still.spans(start, 23, 4)) for start in (0, 3, 8)]
    assert [(s.begin, s.end) for s in ranges[1]] == [(0, 1), (1, 21), (21, 23)] and [s.chunk for s in ranges[2]] == [2, 7]
    assert [(s.begin, s.end) for s in ranges[0]] == [(0, 4), (4, 20), (20, 23)]


@torch.no_grad()
def test_the_state_grows_by_the_salient_tokens_alone():
    mixer = layer("still(chunk=8, kept=2)").float()
    sizes, salient = {}, {}
    for n in (24, 88, 152):
        state = mixer(tokens(n=n).float())[1]
        salient[n] = state.values["salient"].layer.tail.keys.shape[2]  # pyright: ignore
        sizes[n] = state.nbytes - state.values["salient"].nbytes  # pyright: ignore
    assert salient == {24: 2 * 2, 88: 10 * 2, 152: 18 * 2} and len(set(sizes.values())) == 1
    # ring of 15 tokens: keys, values, scores; sums and their denominator; positions
    assert sizes[24] == 2 * (15 * (2 * 2 * 8 + 4) + 4 * 16 * 9) * 4 + 2 * 8


@torch.no_grad()
def test_salient_tokens_of_the_pocket_model_are_read_more_than_tokens_chosen_by_place():
    from random import Random

    from saccade.evaluate.text import grammar
    from saccade.train.convert import swap

    model, _ = saccade.pocket(dtype=torch.float32)
    student = swap(model, "still(chunk=32, kept=2)")
    ids = torch.tensor([[1, *(b + 3 for b in grammar().haystack(Random(0), 639))]])
    hidden = model(ids, output_hidden_states=True).hidden_states
    place = torch.arange(ids.shape[1])
    far = place[:, None] // 32 - place // 32 >= 2
    read = {"salient": 0.0, "first": 0.0, "last": 0.0, "middle": 0.0}
    for x, block in zip(hidden, student.model.stack.blocks, strict=False):
        logits = scaled_logits(block.mixer, block.norm(x))
        exact, linear = block.mixer.coverage(logits)  # pyright: ignore
        weights = logits.masked_fill(~(exact | linear), float("-inf")).softmax(-1)
        chosen = {"salient": exact, "first": place % 32 < 2, "last": place % 32 >= 30, "middle": (place % 32 - 16).abs() < 1.5}
        for name, mask in chosen.items():
            read[name] += float((weights * (far & mask)).sum(-1).mean()) / 8
    # the first token of all, which many heads look at, is among the salient and the first ones
    assert read["salient"] > 1.15 * read["first"] and read["salient"] > 4 * max(read["last"], read["middle"]), read


@torch.no_grad()
def test_in_a_decoder_it_generates_takes_padding_and_opens_again(tmp_path: Path):
    torch.manual_seed(0)
    config = SaccadeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, layers=["still(chunk=4, kept=1)", "softmax"], num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = SaccadeForCausalLM(config).double().eval()
    ids = torch.randint(3, 64, (2, 23), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    wanted: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    both = model.generate(ids * mask, attention_mask=mask, **wanted)
    for row, start in enumerate((9, 0)):
        alone = model.generate(ids[row : row + 1, start:], **wanted)
        assert torch.equal(both[row, start:], alone[0])
        # token by token as in one pass
        assert torch.equal(model(alone[:, :-1]).logits[0, -14:].argmax(-1), alone[0, -14:])
    model.save_pretrained(tmp_path)
    opened = SaccadeForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert opened.config.specs == config.specs and all(map(torch.equal, opened.parameters(), model.parameters()))
    # loaded weights lie elsewhere in memory: products may round otherwise
    assert float((opened(ids).logits - model(ids).logits).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("chunk=0", "chunk=0, kept=None"), ("chunk=8, kept=9", "chunk=8, kept=9"), ("kept=-1", "kept=-1"), ("theta=0.0", "theta=0.0"),
        ("feature_map='elu+1'", "is not one of np, hedgehog"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(fields: str, message: str):
    with pytest.raises(ValueError, match=message):
        build_mixer(f"still({fields})")


def test_a_sixteenth_is_kept_unless_told_otherwise():
    assert [layer(f"still(chunk={size})").kept for size in (64, 16, 8)] == [4, 1, 1]  # pyright: ignore
