"""The gallery's data: the same heads for every method, and what a method selects rather than what ran last."""

from __future__ import annotations

import base64

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saccade.evaluate import gallery
from saccade.methods import load

N = 64


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids() -> list[int]:
    return torch.randint(0, 64, (N,), generator=torch.Generator().manual_seed(1)).tolist()


def test_every_method_is_drawn_on_the_same_heads(model: LlamaForCausalLM) -> None:
    specs = ["quest(page_size=4, budget=0.25, dense_layers=0)", "streaming-llm(sinks=2, window=24)"]
    seen = []
    found, failed = gallery.maps(model, ids(), specs, tell=seen.append)
    assert not failed and seen == specs and list(found) == specs
    places = [[(head["layer"], head["head"]) for head in heads] for heads in found.values()]
    assert places[0] == places[1] and len(places[0]) == 3  # one head in each layer there is
    assert all(head["density"][spec] < 1 for spec, heads in found.items() for head in heads)


def test_a_method_of_several_passes_shows_what_it_selects(model: LlamaForCausalLM) -> None:
    spec = "delta-attention(base='streaming-llm(sinks=2, window=8, block=4)', gamma=16, tail=16)"
    found, failed = gallery.maps(model, ids(), [spec])
    assert not failed
    (head, *_) = found[spec]
    n = head["size"]
    kept = base64.b64decode(head["selections"][spec])
    # a row of pooled queries far from the start: its window and the first keys, nothing between
    row = kept[(n - 1) * n : n * n]
    assert row[n - 1] > 0 and row[0] > 0 and max(row[2 : n - 4]) == 0


def test_a_method_that_can_not_run_is_left_out_with_its_reason(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def select(*given: object) -> None:
        raise ValueError("no room for pages")

    good, bad = "sampleattention(alpha=0.5, row_share=0.2, window_share=0.1, block=16)", gallery.shown("minference")
    monkeypatch.setattr(load("minference"), "select", select)
    found, failed = gallery.maps(model, ids(), [bad, good])
    assert list(found) == [good] and "no room for pages" in failed[bad]


def test_only_what_selects_keys_is_drawn() -> None:
    assert gallery.drawn("quest") and not gallery.drawn("zipcache")
    assert gallery.shown("quest") == "quest(budget=0.25)" and gallery.shown("random-tiles") == "random-tiles"
    assert gallery.shown("streaming-llm") == "streaming-llm(window=256)", "holes are filled for the prompt that is drawn"


def test_a_shortened_prompt_shows_the_tokens_that_stay(model: LlamaForCausalLM) -> None:
    spec = "gemfilter(budget=0.25, at=1, kernel=3)"
    found, failed = gallery.maps(model, ids(), [spec, "duoattention", "quest(budget=1.0)"])
    assert list(found) == [spec] and failed["quest(budget=1.0)"] == "nothing is left out of this prompt"
    assert failed["duoattention"] == "duoattention has a part that is trained: give its plan"
    for head in found[spec]:
        n = head["size"]
        kept = base64.b64decode(head["selections"][spec])
        last, before = kept[(n - 1) * n :], kept[(n - 2) * n : (n - 1) * n]
        assert last[: n - 2] == before[: n - 2], "every query reads the same columns"
        # pooled columns hold 8 tokens each: a quarter of all stays
        assert abs(sum(last[: n - 1]) / 255 + 1 - n / 4) < 1.6
