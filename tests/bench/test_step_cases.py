"""Decoding steps and layers that train are timed on what they say: a long cache, all layers, and states as after n tokens."""

from __future__ import annotations

import time

import pytest
import torch

from saccade.bench import mixer_cases, step_cases, token_cases
from saccade.bench.case import Settings
from saccade.bench.runner import run_cases
from saccade.bench.step_cases import Layers
from saccade.bench.step_shapes import decoding
from saccade.bench.timing import recorded, take_turns
from saccade.ops import decode

CPU = Settings(device="cpu", dtype=torch.float32, budget_ms=1.0)
SMALL = step_cases.Shape(512, 2, 4, 2, 32, 3)


def test_a_step_reads_what_the_method_chooses_in_every_layer():
    layers = Layers(decoding("quest(budget=64, page_size=16, dense_layers=1)"), SMALL, CPU)
    before = [cache.tail.n for cache in layers.caches]
    stats = [(r.stats.decode.computed, r.stats.decode.visible) for r in layers.runners]
    layers.step()
    assert [cache.tail.n for cache in layers.caches] == [n + 1 for n in before] == [SMALL.n + 2] * 3
    read = [r.stats.decode.computed - old for r, (old, _) in zip(layers.runners, stats, strict=True)]
    assert read[0] == SMALL.n + 2 and all(60 <= count <= 80 for count in read[1:])


def test_layers_share_storage_and_have_an_index_and_queries_of_their_own():
    layers = Layers(decoding("quest(budget=64, page_size=16, dense_layers=0)"), SMALL, CPU)
    assert len({cache.tail.keys.data_ptr() for cache in layers.caches}) == 1
    assert len({id(cache.states.get("decode", None)) for cache in layers.caches}) == 3
    assert not torch.equal(layers.queries[0], layers.queries[1])


def test_an_open_method_gives_the_dense_output():
    layers = Layers(decoding("quest(budget=1.0, dense_layers=0)"), SMALL, CPU)
    out = layers.step()
    tail = layers.caches[-1].tail
    assert torch.allclose(out, decode(layers.queries[-1], tail.keys, tail.values).out, atol=1e-5)


def test_a_policy_holds_less_in_storage_of_its_own():
    layers = Layers(decoding("snapkv(budget=0.25, window=16)"), SMALL, CPU)
    assert layers.bytes()[0] < 0.5 * SMALL.cache_bytes(4)
    dense = Layers(None, SMALL, CPU)
    assert all(cache.tail.n == SMALL.n + 1 for cache in dense.caches)


@pytest.mark.parametrize("make", [step_cases.attention_case, step_cases.model_case])
@pytest.mark.parametrize("spec", ["quest(budget=64)", "loki(budget=64)"])
def test_cases_run_beside_dense_attention(make, spec: str, monkeypatch: pytest.MonkeyPatch):
    """Among them one that needs a plan."""
    monkeypatch.setattr(token_cases, "TOKENS", 3)
    rows = run_cases("step", "asked", [make(spec, SMALL, 4)], CPU)["rows"]
    rows = [row for row in rows if row["role"] != "peer"]  # libraries that may not be there
    assert {row["role"] for row in rows} == {"ours", "dense"} and all(row["status"] == "ok" and row["ms"] > 0 for row in rows), rows


def test_prefill_methods_are_refused():
    with pytest.raises(ValueError, match="acts in the prefill phase"):
        decoding("minference")


def test_a_training_step_gives_every_parameter_a_gradient_and_runs_beside_a_llama():
    shape = mixer_cases.Shape(32, 2, dim=32, heads=2, kv_heads=2)
    field = mixer_cases.training_case("deltanet", shape, 4).build(CPU)
    assert [c.role for c in field.contestants] == ["ours", "dense"]
    for contestant in field.contestants:
        y = contestant.make().call()
        assert y.shape == (2, 32, 32)
    assert field.contestants[0].work.flops < field.contestants[1].work.flops


def test_states_are_those_after_n_tokens():
    shape = mixer_cases.Shape(500, 1, dim=32, heads=2, kv_heads=2, layers=4)
    stack = mixer_cases._stack("deltanet*3,softmax", shape, CPU)
    _, states = stack(torch.randn(1, mixer_cases.PROMPT, 32))
    filled = [mixer_cases._after(state, 500, CPU) for state in states]
    assert [int(state.position) for state in filled] == [500] * 4
    held = [[store.layer.tail.n for store in mixer_cases._stores(state.values)] for state in filled]
    assert held == [[], [], [], [500]]
    _, after = stack(torch.randn(1, 1, 32), filled)
    assert [int(state.position) for state in after] == [501] * 4


@pytest.mark.parametrize(("text", "message"), [("deltanet*3", "do not repeat evenly"), ("deltanett", "deltanet")])
def test_lists_of_layers_that_fit_nowhere(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        mixer_cases.specs_of(text, 4)


@pytest.mark.gpu
def test_a_recorded_step_does_its_work_again_and_one_that_waits_is_not_recorded():
    x = torch.ones(64, device="cuda")
    torch.cuda.synchronize()
    again = recorded(lambda: x.add_(1))
    assert again is not None and float(x[0]) == 2  # once before it is recorded
    again()
    again()
    assert float(x[0]) == 4
    assert recorded(lambda: float(x.sum())) is None
    assert float(x.add_(1)[0]) == 5


@pytest.mark.gpu
def test_a_recorded_step_keeps_what_it_reads() -> None:
    """A step that replaces its state: the old one is held for the graph, and its memory goes to nobody else."""
    held = [torch.ones(1 << 20, device="cuda")]

    def step() -> None:
        held[0] = held[0] + 1

    again = recorded(step)
    assert again is not None
    made = held[0]
    held[0] = torch.zeros(1, device="cuda")
    others = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(8)]
    again()
    assert float(made[0]) == 3 and float(made[-1]) == 3 and len(others) == 8


@pytest.mark.gpu
def test_ahead_of_the_clock_the_launches_are_queued():
    """A host that thinks between two launches: the GPU's work alone is well below what the user waits for."""
    x = torch.ones(64, device="cuda")

    def slow() -> None:
        x.add_(1)
        time.sleep(0.005)
        x.add_(1)

    slow()
    runs = {"waiting": slow, "queued": slow}
    times, _ = take_turns(runs, device="cuda", budget_ms=20, once_ms=dict.fromkeys(runs, 5.0), ahead_ms={"queued": 20})
    assert times["waiting"].median > 4 > 10 * times["queued"].median
