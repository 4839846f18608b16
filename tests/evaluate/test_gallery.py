"""The gallery's data: the same heads for every method, and what a method selects rather than what ran last."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saccade.attach import calibrate
from saccade.catalog import catalog
from saccade.core import Calibrated, format_spec
from saccade.evaluate import gallery
from saccade.evaluate.contenders import Contender, contender
from saccade.evaluate.gallery_encoded import FULL_BITS, encoded, relative, store
from saccade.evaluate.gallery_layers import Layer, dense_layers, left_in_model, read_in_steps
from saccade.methods import build, load
from saccade.methods.cache.adore import Adore
from saccade.train.token_controller import controller_plan, new_controller

N = 64
PAGE = Path(__file__).parents[2] / "docs" / "gallery" / "index.md"
ISSUES = ("prefill", "static", "decode", "cache", "kvcomp")  # families whose every system is on the page
ENCODERS = [row.slug for row in catalog().values() if row.done and row.family == "kvcomp"]


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
    drawn = gallery.maps(model, ids(), specs, tell=seen.append)
    found = drawn.heads
    assert not drawn.failed and seen == specs and list(found) == specs and not drawn.told
    places = [[(head["layer"], head["head"]) for head in heads] for heads in found.values()]
    assert places[0] == places[1] and len(places[0]) == 3  # one head in each layer there is
    assert all(head["density"][spec] < 1 for spec, heads in found.items() for head in heads)


def test_a_method_of_several_passes_shows_what_it_selects(model: LlamaForCausalLM) -> None:
    spec = "delta-attention(base='streaming-llm(sinks=2, window=8, block=4)', gamma=16, tail=16)"
    drawn = gallery.maps(model, ids(), [spec])
    assert not drawn.failed
    (head, *_) = drawn.heads[spec]
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
    drawn = gallery.maps(model, ids(), [bad, good])
    assert list(drawn.heads) == [good] and "no room for pages" in drawn.failed[bad]


def test_what_is_drawn_and_with_which_settings() -> None:
    assert gallery.drawn("quest") and gallery.drawn("zipcache")
    assert gallery.shown("zipcache") == "zipcache" and gallery.shown("kvquant") == "kvquant(bits=3)"
    assert gallery.shown("quest") == "quest(budget=0.25)" and gallery.shown("random-tiles") == "random-tiles"
    assert gallery.shown("streaming-llm") == "streaming-llm(window=256)", "holes are filled for the prompt that is drawn"


def test_a_shortened_prompt_shows_the_tokens_that_stay(model: LlamaForCausalLM) -> None:
    spec = "gemfilter(budget=0.25, at=1, kernel=3)"
    drawn = gallery.maps(model, ids(), [spec, "duoattention", "quest(budget=1.0)"])
    assert list(drawn.heads) == [spec] and drawn.failed["quest(budget=1.0)"] == "nothing is left out of this prompt"
    assert drawn.failed["duoattention"] == "duoattention has a part that is trained: give its plan"
    for head in drawn.heads[spec]:
        n = head["size"]
        kept = base64.b64decode(head["selections"][spec])
        last, before = kept[(n - 1) * n :], kept[(n - 2) * n : (n - 1) * n]
        assert last[: n - 2] == before[: n - 2], "every query reads the same columns"
        # pooled columns hold 8 tokens each: a quarter of all stays
        assert abs(sum(last[: n - 1]) / 255 + 1 - n / 4) < 1.6


# -- the page that comes with the library -------------------------------------------------------------------------------


def test_every_system_has_an_entry_and_a_picture() -> None:
    page = PAGE.read_text(encoding="utf-8")
    systems = [row.slug for row in catalog().values() if row.done and row.family in ISSUES]
    assert len(systems) >= 61
    lacking = [
        slug for slug in systems
        if f"### [{slug}](" not in page or f"({slug}.png)" not in page or f"`{gallery.shown(slug)}`: " not in page
    ]  # fmt: skip
    assert not lacking, "run saccade gallery --out docs/gallery"
    assert not [slug for slug in systems if not (PAGE.parent / f"{slug}.png").is_file()]
    assert "## Not drawn" not in page
    drawn = {path.stem for path in PAGE.parent.glob("*.png")} - {"attention"}
    assert drawn == {row.slug for row in catalog().values() if row.done and row.slug in drawn}, "pictures of what is no method"


# -- what stores entries in another form ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layers(model: LlamaForCausalLM) -> list[Layer]:
    # queries of a random model look everywhere alike, whatever becomes of the keys
    return [replace(layer, q=layer.q * 100) for layer in dense_layers(model, ids())]


def planned(model: LlamaForCausalLM, spec: str) -> Contender:
    method = build(spec)
    plans = [calibrate(model, method, [torch.tensor([ids()])])] if isinstance(method, Calibrated) else []
    return replace(contender(spec), plans=plans)


def settings(slug: str, **more: object) -> str:
    return format_spec(slug, {**load(slug).info.tiny, **more})


@pytest.mark.parametrize("slug", ENCODERS)
def test_open_settings_change_nothing_and_others_do(model: LlamaForCausalLM, layers: list[Layer], slug: str) -> None:
    places = [(0, 1), (2, 3)]
    for spec, opened in ((settings(slug, **load(slug).info.opened), True), (settings(slug), False)):
        heads, change = encoded(layers, planned(model, spec), places, 2)
        assert [(head["layer"], head["head"]) for head in heads] == places
        worst = max(abs(a - b) for head in heads for a, b in zip(*(base64.b64decode(head[x]) for x in ("map", "decoded")), strict=True))
        errors = [x for head in heads for part in head["error"].values() for x in base64.b64decode(part)]
        if opened:
            # numbers through full low-rank maps are rounded
            assert worst <= 2 and max(errors) <= 5 and change.moved < 0.01 and change.error < 0.01
            assert change.share == pytest.approx(1.0, abs=0.02)
        else:
            assert worst > 2 and max(errors) > 10 and change.moved > 1e-3 and change.error > 0.01


@pytest.mark.parametrize(
    "spec", [settings("zipcache", salient_bits=16), settings("zipvl", high_bits=16), settings("akvq-vl", text_layers=())]
)
def test_bits_stand_at_the_tokens_that_have_them(model: LlamaForCausalLM, layers: list[Layer], spec: str) -> None:
    mixed = 0
    for layer in layers:
        found = store(layer, planned(model, spec))
        exact = relative(found.keys, layer.k[0].to(torch.bfloat16).float()) == 0
        assert bool(found.held.all()) and torch.equal(found.bits[0] == FULL_BITS, exact)
        mixed += int(bool(exact.any()) and not bool(exact.all()))
    assert mixed == len(layers)


@pytest.mark.parametrize("slug", ["akvq-vl", "cskv", "matryoshkakv", "think"])
def test_bits_add_up_to_the_bytes(model: LlamaForCausalLM, layers: list[Layer], slug: str) -> None:
    for layer in layers:
        found = store(layer, planned(model, settings(slug)))
        told = float((found.bits[0] * layer.k.shape[-1] + found.bits[1] * layer.v.shape[-1]).sum()) / 8
        assert told == pytest.approx(found.nbytes, rel=0.02)


def test_what_is_dropped_is_empty_and_gets_no_attention(model: LlamaForCausalLM, layers: list[Layer]) -> None:
    spec = settings("zipvl", rest="drop", tau=0.5)
    found = store(layers[1], planned(model, spec))
    assert not bool(found.held.all()) and torch.equal(found.bits[0] == 0, ~found.held)
    (head,), change = encoded(layers, planned(model, spec), [(1, 0)], 1)
    before, after = (torch.frombuffer(bytearray(base64.b64decode(head[x])), dtype=torch.uint8).view(N, N) for x in ("map", "decoded"))
    gone = ~found.held[0]
    assert int(after[:, gone].max()) == 0 and int(before[:, gone].max()) > 0 and change.moved > 0
    bits = torch.frombuffer(bytearray(base64.b64decode(head["bits"]["key"])), dtype=torch.uint8)
    assert torch.equal(bits == 0, gone)


# -- what is chosen when a prompt has ended -------------------------------------------------------------------------------


def test_the_ways_of_drawing() -> None:
    ways = {
        slug: gallery.how(contender(slug)) for slug in ("quest", "snapkv", "spatten", "shadowkv", "infllm", "adore", "think", "deltallm")
    }
    assert ways == {
        "quest": "replay", "snapkv": "replay", "spatten": "replay", "shadowkv": "steps", "infllm": "steps", "adore": "model",
        "think": "encoded", "deltallm": "sent",
    }  # fmt: skip


def test_a_draft_is_chosen_once_and_read_by_every_step(layers: list[Layer]) -> None:
    spec, prompt = settings("sparse-to-dense"), N // 2
    for mask in read_in_steps(layers, contender(spec), prompt).values():
        assert torch.equal(mask[:, :prompt, :prompt], torch.ones(prompt, prompt, dtype=torch.bool).tril().expand(4, -1, -1))
        steps = mask[:, prompt:, :prompt]
        assert bool((steps == steps[:, :1]).all()) and int(steps[0, 0].sum()) == prompt // 4
        assert bool(mask[:, prompt:, prompt:].eq(torch.ones(prompt, prompt, dtype=torch.bool).tril()).all())


@pytest.mark.parametrize(("slug", "least", "most"), [("shadowkv", 8, 30), ("retrievalattention", 8, 20), ("squeezed-attention", 1, 31)])
def test_steps_read_a_part_of_the_prompt(layers: list[Layer], slug: str, least: int, most: int) -> None:
    prompt = N // 2
    masks = read_in_steps(layers, contender(settings(slug)), prompt)
    # the first step may be read whole
    read = torch.stack([mask[:, prompt + 2 :, :prompt].sum(-1).float().mean() for mask in masks.values()]).mean()
    assert least <= float(read) <= most
    assert all(bool(mask.diagonal(dim1=1, dim2=2).all()) and not bool(mask.triu(1).any()) for mask in masks.values())


def test_a_far_memory_shows_its_choice_in_the_prompt(layers: list[Layer]) -> None:
    for mask in read_in_steps(layers, contender(settings("infllm")), N).values():
        last = mask[:, -1]
        assert bool(last[:, :2].all()) and bool(last[:, -16:].all()), "first keys and window"
        assert bool((last.sum(-1) < N).all()) and bool((last == last[:1]).all()), "all heads read the same blocks"


def test_a_policy_on_the_model_shows_what_is_left(model: LlamaForCausalLM) -> None:
    method = Adore(size=16, rebuild=1, recent=4)
    one = replace(contender(method.spec), plans=[controller_plan(model, method, new_controller(model))])
    for mask in left_in_model(model, one, ids()).values():
        assert mask.shape == (2, N, N) and bool((mask == mask[:, :1]).all())
        assert int(mask[0, 0].sum()) == 16 and bool(mask[0, 0, -4:].all())
    drawn = gallery.maps(model, ids(), [method.spec], plans=one.plans)
    assert list(drawn.heads) == [method.spec] and not drawn.told, "a plan that was given is not one made for the picture"


def test_changes_of_keys_show_which_channels_are_sent(model: LlamaForCausalLM) -> None:
    spec = "deltallm(theta=0.3, window=8, restart=32)"
    drawn = gallery.maps(model, ids(), [spec, "deltallm(theta=0.0, window=8)"])
    assert list(drawn.heads) == [spec] and len(drawn.failed) == 1
    for head in drawn.heads[spec]:
        n, strip = head["size"], base64.b64decode(head["strip"])
        kept = base64.b64decode(head["selections"][spec])
        assert strip[-1] == 255 and min(strip) < 200 and 0 < head["density"][spec] < 1
        assert kept[n * n - 1] == 255, "the window is read whole"
    assert drawn.told[spec].endswith("of the products are left.")


def test_layers_take_their_steps_together(layers: list[Layer]) -> None:
    # one threshold for all layers: the first one reads otherwise when it is on its own
    one, prompt = contender(settings("squeezed-attention")), N // 2
    together, alone = (read_in_steps(own, one, prompt)[0] for own in (layers, layers[:1]))
    assert not torch.equal(together, alone)
