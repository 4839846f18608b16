"""DuoAttention (duoattention, 2410.10819): gates, the split of the heads in every phase, memory, and needles on the pocket model."""

from __future__ import annotations

from random import Random

import pytest
import torch
import transformers
from tests.contract.harness import error, greedy, llama, logits, tokens
from tests.methods.cache.needles import BYTE, pocket, prompts
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import saccade
from saccade.core import Plan
from saccade.evaluate.text import grammar
from saccade.methods.cache.duoattention import DuoAttention
from saccade.train.gates import gates_plan, mixing_session, passkeys, train_gates

FIRST = [[1.0, 0.0], [0.0, 0.5]]  # gates of the tiny model: half of the heads are the first of layer 0 and the second of layer 1
SPLIT = "duoattention(sinks=4, recent=16, block=4)"
# what `test_gates_of_the_pocket_model` trains
POCKET = [[0, 0], [0.82, 0], [0, 0], [0.95, 0], [0, 0], [1, 0.83], [0.1, 1], [0.9, 0.9]]


def plan_of(gates: list[list[float]], model: PreTrainedModel | None = None) -> Plan:
    return gates_plan(llama() if model is None else model, torch.tensor(gates))


def masked(model: PreTrainedModel, ids: Tensor, seen: Tensor) -> Tensor:
    """Logits with a bool mask `(N, N)` in every layer."""
    with torch.no_grad():
        return model(ids, attention_mask=seen[None, None]).logits.double()


def band(n: int, sinks: int, recent: int, block: int = 1) -> Tensor:
    rows, keys = torch.arange(n).unsqueeze(1), torch.arange(n)
    near = rows // block - keys // block < recent // block + (block > 1)
    return (keys <= rows) & ((keys < sinks) | near)


# -- gates -----------------------------------------------------------------------------------------------------------------


def test_gates_of_one_are_dense_and_gates_of_zero_stream() -> None:
    model, ids = llama(), tokens(2, 60)
    dense, near = masked(model, ids, torch.ones(60, 60).tril().bool()), masked(model, ids, band(60, 3, 10))
    with mixing_session(model, torch.ones(2, 2), sinks=3, recent=10):
        assert error(logits(model, ids), dense) < 1e-9
    with mixing_session(model, torch.zeros(2, 2), sinks=3, recent=10):
        assert error(logits(model, ids), near) < 1e-9
    with mixing_session(model, torch.tensor([[0.5, 1.0], [1.0, 1.0]]), sinks=3, recent=10):
        assert error(logits(model, ids), dense) > 1e-3


def planted() -> PreTrainedModel:
    """Two layers, four key/value heads; only the second head of layer 0 writes anything, and its attention is flat: it needs all keys."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight.zero_()
            attention.v_proj.weight.normal_()
            keep = attention.o_proj.weight.clone().normal_() * 4
            attention.o_proj.weight.zero_()
            if attention.layer_idx == 0:
                attention.o_proj.weight[:, 16:] = keep[:, 16:]
    return model


def random_samples(n: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    answers = torch.zeros(1, 80, dtype=torch.bool)
    answers[:, 60:] = True
    return [(torch.randint(3, 40, (1, 80), generator=generator), answers) for _ in range(n)]


def test_planted_copy_head_keeps_its_gate() -> None:
    model = planted()
    steps: list[dict[str, float]] = []
    plan = train_gates(model, random_samples(60), steps=60, rate=0.05, sinks=2, recent=8, progress=steps.append)
    gates = torch.stack([plan.tensor(layer, "gate") for layer in range(2)])
    assert gates[0, 1] > 0.8 and gates.flatten()[[0, 2, 3]].max() < 0.05, gates
    assert len(steps) == 60 and steps[0]["distance"] == pytest.approx(0, abs=1e-9) and steps[0]["loss"] == pytest.approx(0.05)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    # with that head alone in full the model is itself; with any other it is not
    ids, dense = torch.randint(3, 40, (1, 90), generator=torch.Generator().manual_seed(9)), None
    with torch.no_grad():
        dense = model(ids).logits
        for place, wrong in ((plan, False), (plan_of([[1.0, 0.0], [0.0, 0.0]], model), True)):
            with saccade.attach(model, cache="duoattention(share=0.25, sinks=2, recent=8, block=2)", plan=place):
                assert (error(model(ids).logits, dense) > 0.1) == wrong
    again = train_gates(model, random_samples(60), steps=60, rate=0.05, sinks=2, recent=8)
    assert all(torch.equal(again.tensors[name], x) for name, x in plan.tensors.items())


def test_samples_are_checked() -> None:
    with pytest.raises(ValueError, match="ended after 2 of 3 steps"):
        train_gates(planted(), random_samples(2), steps=3)
    ids, answers = random_samples(1)[0]
    with pytest.raises(ValueError, match="with some position set"):
        train_gates(planted(), [(ids, answers & False)], steps=1)


def test_passkeys_mark_what_predicts_an_answer() -> None:
    ids, predicts = passkeys(grammar(), list, Random(3), prefix=[300], length=1500, count=3, words=4)
    text = bytes(ids[0, 1:].tolist())
    where = predicts[0].nonzero().flatten().tolist()
    told = bytes(int(ids[0, i + 1]) for i in where).decode()
    answers = [a for a in told.split(".") if a]
    assert len(answers) == 3 and all(text.count(answer.encode()) == 2 for answer in answers)
    assert abs(len(text) - 1500) < 8 and int(ids[0, 0]) == 300
    with pytest.raises(ValueError, match="do not fit into 300 bytes"):
        passkeys(grammar(), list, Random(3), length=300)


# -- the split -------------------------------------------------------------------------------------------------------------


def test_all_streaming_equals_the_band() -> None:
    model, ids = llama(), tokens(1, 90)
    seen = band(90, 4, 16, block=4)
    expected = masked(model, ids, seen)
    with saccade.attach(model, cache=SPLIT.replace("(", "(share=0, "), plan=plan_of(FIRST)) as handle:
        assert error(logits(model, ids, steps=20), expected) < 1e-6
        stats = handle.stats()
    # 4 sinks, and what stands in the last five blocks: 70 tokens were fed at once, and 20 one by one
    assert stats.kept == [[4 + 18, 4 + 18]] * 2
    assert stats.prefill_density == pytest.approx(float(seen[:70].sum()) / (70 * 71 / 2), abs=0.03)


def test_chunks_run_at_constant_memory_and_change_nothing() -> None:
    model, ids = llama(), tokens(2, 200)
    held = []
    with saccade.attach(model, cache=SPLIT, plan=plan_of(FIRST)) as handle:
        whole = logits(model, ids, steps=8)
    with saccade.attach(model, cache=SPLIT, plan=plan_of(FIRST), when="call") as handle, torch.no_grad():
        c, parts = DynamicCache(config=model.config), []
        for begin, end in ((0, 60), (60, 117), (117, 120), (120, 192), *((i, i + 1) for i in range(192, 200))):
            parts.append(model(ids[:, begin:end], past_key_values=c).logits)
            held.append(handle.stats().kept)
    assert error(torch.cat(parts, 1), whole) < 1e-6
    # the first head of layer 0 and the second of layer 1 grow, the others do not
    assert [(own[0][0], own[1][1]) for own in held[:4]] == [(60, 60), (117, 117), (120, 120), (192, 192)]
    assert all(max(own[0][1], own[1][0]) <= 4 + 16 + 4 for own in held[:4])


def test_memory_is_freed_head_by_head() -> None:
    model, ids = llama(), tokens(1, 400)
    sizes = {}
    for share in (0.5, 1.0):
        with saccade.attach(model, cache=f"duoattention(share={share}, sinks=4, recent=16, block=4)", plan=plan_of(FIRST)) as handle:
            with torch.no_grad():
                c = model(ids, use_cache=True).past_key_values
            handle.compress(c)
            sizes[share] = handle.stats().kv_bytes
            kept = handle.stats().kept
        assert kept == ([[400, 20], [20, 400]] if share == 0.5 else [[400, 400]] * 2)
    # two layers, keys and values, 16 channels in float64; the whole cache has room for some more entries
    assert sizes[0.5] == 2 * 420 * 2 * 16 * 8 and sizes[1.0] >= 2 * 800 * 2 * 16 * 8


def test_guesses_and_a_second_turn_read_the_same_pattern() -> None:
    model, ids = llama(), tokens(1, 20).repeat(1, 5)
    with saccade.attach(model, cache=SPLIT, plan=plan_of(FIRST)):
        plain = greedy(model, ids, 24)
        assert torch.equal(greedy(model, ids, 24, prompt_lookup_num_tokens=4), plain)
        c = DynamicCache(config=model.config)
        greedy(model, ids, 24, past_key_values=c)
        # a later turn is a chunk of one long sequence
        turn = torch.cat([plain, tokens(1, 40, seed=4)], 1)
        with torch.no_grad():
            later = model(turn[:, c.get_seq_length() :], past_key_values=c).logits
        assert error(later[:, -1], logits(model, turn)[:, -1]) < 1e-6


def test_prefill_alone_leaves_the_cache_whole() -> None:
    model, ids = llama(), tokens(1, 120)
    with saccade.attach(model, prefill=DuoAttention(sinks=4, recent=16, block=4), plan=plan_of(FIRST)) as handle, torch.no_grad():
        model(ids, use_cache=True)
        stats = handle.stats()
    assert stats.kept == [[120, 120]] * 2 and stats.prefill_density is not None and stats.prefill_density < 0.75


def needle(spec: str, gates: list[list[float]], length: int = 1280) -> tuple[int, float]:
    """Needles found of two, and the bytes of the cache as a share of the dense one's."""
    model = pocket()
    ids, wanted = prompts(length, (0.15, 0.7), seed=3)
    with saccade.attach(model, cache=spec, plan=plan_of(gates, model)) as handle:
        out = model.generate(ids, max_new_tokens=max(map(len, wanted)) + 1, do_sample=False, pad_token_id=0, eos_token_id=2)
        stats = handle.stats()
    texts = [bytes(max(0, token - BYTE) for token in row) for row in out[:, ids.shape[1] :].tolist()]
    share = stats.kv_bytes / (len(ids) * stats.tokens_seen * 8 * 2 * 2 * 64 * 4)
    return sum(text.startswith(answer + b".") for text, answer in zip(texts, wanted, strict=True)), share


def test_needles_survive_with_the_trained_gates() -> None:
    hits, share = needle("duoattention(share=0.18, sinks=8, recent=48, block=8)", POCKET)
    assert hits == 2 and share < 0.31
    hits, _ = needle("duoattention(share=0.18, sinks=8, recent=48, block=8)", [[1 - x for x in own] for own in POCKET])
    assert hits == 0


@pytest.mark.slow
def test_gates_of_the_pocket_model() -> None:
    rng = Random(0)

    def samples():
        while True:
            yield passkeys(grammar(), lambda text: [b + BYTE for b in text], rng, prefix=[1], length=400, count=2, words=0)

    plan = train_gates(pocket(), samples(), steps=24, rate=0.1, sinks=8, recent=48)
    gates = [plan.tensor(layer, "gate").tolist() for layer in range(8)]
    assert max(max(gates[layer]) for layer in (0, 2, 4)) < 0.3 < 0.7 < min(max(gates[layer]) for layer in (5, 6))
    assert needle("duoattention(share=0.25, sinks=8, recent=48, block=8)", gates)[0] == 2


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"share": 1.2}, {"share": True}, {"sinks": -1}, {"recent": 0}, {"block": 0}], ids=str)
def test_wrong_fields_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"duoattention\\({next(iter(given))}="):
        DuoAttention(**given)  # pyright: ignore[reportArgumentType]


def test_the_place_of_every_phase_is_taken() -> None:
    with pytest.raises(ValueError, match="acts on the prefill phase too"):
        saccade.attach(llama(), prefill="minference", cache=SPLIT, plan=plan_of(FIRST))
