"""The hybrid decoder: one language model for any list of mixers, and a real transformers model."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import saccade
from saccade.cache.state_layer import StateLayer
from saccade.core import REGISTRY, Info, Mixer, register
from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM, load_cache, save_cache, schedule

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.2, "vocab_size": 97, "eos_token_id": None,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"layers": ["deltanet", "kimi-linear", "lightning-attention"]},
    "hybrid": {"layers": ["kimi-linear"] * 3 + ["softmax(rotary=False)"], "num_key_value_heads": 2},
    "windows": {"layers": ["softmax(window=8)", "softmax(window=16, sinks=2)", "softmax"]},
    "parallel": {"layers": ["softmax(window=8) & deltanet"], "num_hidden_layers": 2},
    "shared": {"layers": ["softmax", "softmax(kv_from=0)", "softmax(window=8)", "softmax(window=8, kv_from=2)"]},
    "looped": {"layers": ["deltanet", "softmax(window=8)"], "loops": 3},
    "meta": {"layers": ["softmax(window=8, sinks=3)", "deltanet"], "meta_tokens": 3},
}


def model(kind: str = "hybrid", dtype: torch.dtype = torch.float64, **changed: Any) -> SaccadeForCausalLM:
    torch.manual_seed(0)
    made = SaccadeForCausalLM(SaccadeConfig(**{**SMALL, **KINDS[kind], **changed})).eval()
    if made.model.stack.carry is not None:
        made.model.stack.carry.data.normal_(std=0.3)
    return made.to(dtype)


def tokens(b: int = 2, n: int = 40, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, (b, n), generator=torch.Generator().manual_seed(seed))


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@torch.no_grad()
def fed(made: SaccadeForCausalLM, ids: Tensor, lengths: list[int], mask: Tensor | None = None) -> Tensor:
    cache, outs, begin = DynamicCache(config=made.config), [], 0
    for n in lengths:
        seen = None if mask is None else mask[:, : begin + n]
        outs.append(made(ids[:, begin : begin + n], attention_mask=seen, past_key_values=cache).logits)
        begin += n
    return torch.cat(outs, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_at_once_in_chunks_and_token_by_token_is_the_same(kind: str):
    made, ids = model(kind), tokens()
    whole = made(ids, use_cache=False).logits
    for lengths in ([40], [1] * 40, [25, 1, 1, 13]):
        assert error(fed(made, ids, lengths), whole) < 1e-10, lengths


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_is_that_without(kind: str):
    made, ids = model(kind), tokens(n=12)
    greedy = made.generate(ids, max_new_tokens=10, do_sample=False)
    assert greedy.shape == (2, 22)
    assert torch.equal(greedy, made.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False))
    for row in range(2):
        alone = made.generate(ids[row : row + 1], max_new_tokens=10, do_sample=False)
        assert torch.equal(alone[0], greedy[row])


@pytest.mark.parametrize("kind", ["hybrid", "windows", "parallel", "looped", "meta"])
def test_beams_samples_and_prompt_lookup(kind: str):
    made, ids = model(kind), tokens(n=12)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    assert torch.equal(made.generate(ids, **options), made.generate(ids, use_cache=False, **options))
    assert made.generate(ids, max_new_tokens=3, do_sample=True, num_return_sequences=3).shape == (6, 15)
    again = ids[:1].repeat(1, 8)  # repeats itself, so that looked-up tokens are proposed, and some are wrong
    looked_up = made.generate(again, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=5)
    assert torch.equal(looked_up, made.generate(again, max_new_tokens=20, do_sample=False))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_left_and_right_changes_nothing(kind: str):
    made, ids = model(kind), tokens(3, 30)
    mask = torch.ones_like(ids)
    mask[0, :11], mask[1, 20:], mask[2, :2] = 0, 0, 0
    alone = [made(ids[row : row + 1, mask[row].bool()]).logits[0] for row in range(3)]
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    given = made(ids, attention_mask=mask, position_ids=places).logits
    for logits in (made(ids, attention_mask=mask).logits, fed(made, ids, [9, 10, 1, 10], mask), given):
        for row in range(3):
            assert error(logits[row, mask[row].bool()], alone[row]) < 1e-10
    left = torch.ones_like(ids)
    left[0, :11], left[2, :2] = 0, 0
    together = made.generate(ids, attention_mask=left, max_new_tokens=8, do_sample=False)
    for row in range(3):
        own = made.generate(ids[row : row + 1, left[row].bool()], max_new_tokens=8, do_sample=False)
        assert torch.equal(own[0, -8:], together[row, -8:])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_loaded(kind: str, tmp_path: Path):
    made, ids = model(kind, torch.float32), tokens()
    made.save_pretrained(tmp_path)
    for loader in (SaccadeForCausalLM, AutoModelForCausalLM):
        again = loader.from_pretrained(tmp_path)
        assert type(again) is SaccadeForCausalLM and again.config.specs == made.config.specs
        assert error(again(ids).logits, made(ids).logits) == 0
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_auto_classes_know_it_after_import_saccade_which_imports_neither_torch_nor_transformers(tmp_path: Path):
    made = model("hybrid", torch.float32)
    made.save_pretrained(tmp_path)
    code = (
        "import sys, saccade; assert not {'torch', 'transformers'} & set(sys.modules);"
        "from transformers import AutoConfig, AutoModelForCausalLM;"
        f"print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__);"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    # this file has imported the auto classes before saccade, the other order
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["SaccadeConfig", "SaccadeForCausalLM"], ran.stderr


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight_and_checkpointing_changes_none(kind: str):
    made, ids = model(kind).train(), tokens()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            made.gradient_checkpointing_enable()
        made.zero_grad()
        made(ids, labels=ids).loss.backward()
        found.append({name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None})
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())
    assert made.model.stack.gradient_checkpointing
    assert all(error(found[0][name], found[1][name]) < 1e-11 for name in found[0])


def test_loss_is_the_mean_over_tokens_that_count():
    made, ids = model(), tokens()
    labels = ids.clone()
    labels[0, :20] = -100
    logits = made(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert error(made(ids, labels=labels).loss, expected) < 1e-6
    assert made(ids, logits_to_keep=3).logits.shape == (2, 3, 97)
    assert len(made(ids, output_hidden_states=True).hidden_states) == 5


# -- what the kinds mean ---------------------------------------------------------------------------------------------------


def test_one_loop_is_the_plain_stack_and_more_run_it_again():
    once, thrice = model("looped", loops=1), model("looped")
    thrice.model.stack.blocks.load_state_dict(once.model.stack.blocks.state_dict())
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    y = x
    for loop in range(3):
        y = once.model.stack(y, keep=False)[0] + thrice.model.stack.carry[loop] * y
    assert error(thrice.model.stack(x, keep=False)[0], y) < 1e-11
    cache = DynamicCache(config=thrice.config)
    thrice(tokens(), past_key_values=cache)
    assert len(cache.layers) == 6  # one for each layer of each loop


def test_loops_widen_what_windows_reach():
    """The output at t depends on t - s for s up to loops * layers * (window - 1), and on nothing before (lt2)."""
    made = model("looped", layers=["softmax(window=4)"], num_hidden_layers=2, loops=2)
    made.model.stack.carry.data.zero_()
    x = torch.randn(1, 40, 32, dtype=torch.float64, requires_grad=True)
    made.model.stack(x, keep=False)[0][0, 35].sum().backward()
    reached = x.grad.abs().sum((0, 2)).nonzero().flatten()
    assert reached.min() == 35 - 2 * 2 * 3 and reached.max() == 35


def test_meta_tokens_are_learned_embeddings_in_front():
    made, plain, ids = model("meta"), model("meta", meta_tokens=0), tokens()
    plain.load_state_dict({name: x for name, x in made.state_dict().items() if name != "model.meta"})
    front = made.model.meta.expand(2, -1, -1)
    expected = plain(inputs_embeds=torch.cat([front, made.model.embed_tokens(ids)], 1)).logits[:, 3:]
    assert error(made(ids).logits, expected) < 1e-11
    cache = DynamicCache(config=made.config)
    made(ids, past_key_values=cache)
    assert cache.get_seq_length() == 40  # meta tokens are not the user's


def test_a_layer_that_reads_another_s_keys_stores_none():
    made, ids = model("shared"), tokens()
    cache = DynamicCache(config=made.config)
    made(ids, past_key_values=cache)
    sizes = [layer.nbytes for layer in cache.layers]
    assert sizes[1] == sizes[3] == 16 and sizes[0] > sizes[2] > 16
    names = dict(made.named_parameters())
    assert not any("k_proj" in name for name in names if ".blocks.1." in name)


def test_mixers_side_by_side_weigh_alike_whatever_their_scale():
    torch.manual_seed(0)
    layer = saccade.mixer("softmax & deltanet", dim=32, heads=4).double()
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    y = layer(x)[0]
    layer.branches[0].o_proj.weight.data *= 100
    assert error(layer(x)[0], y) < 1e-3
    layer.norms.data[1] = 0
    out = layer.branches[0](x)[0]
    assert error(layer(x)[0], torch.nn.functional.rms_norm(out, (32,), eps=1e-6) / 2) < 1e-10
    assert error(layer(x)[0], layer.naive(x)) < 1e-10


def test_linear_layers_keep_a_state_of_one_size_and_softmax_layers_grow():
    made = model("hybrid", torch.float32)
    sizes = []
    for n in (16, 64, 256):
        cache = DynamicCache(config=made.config)
        made(tokens(1, n), past_key_values=cache)
        sizes.append([layer.nbytes for layer in cache.layers])
    for layer in range(3):
        assert len({size[layer] for size in sizes}) == 1
    assert sizes[0][3] < sizes[1][3] < sizes[2][3]


def test_schedules():
    assert schedule("3:1", 8, "deltanet") == ["deltanet", "deltanet", "deltanet", "softmax"] * 2
    assert schedule("pure", 2, "deltanet") == schedule("1:0", 2, "deltanet") == ["deltanet"] * 2
    assert schedule("bookend:1", 4, "a", "b") == ["b", "a", "a", "b"]
    assert schedule("at:0,3", 4, "a", "b") == ["b", "a", "a", "b"]
    for pattern in ("3", "at:9", "0:0", "bookend"):
        with pytest.raises(ValueError):
            schedule(pattern, 4, "deltanet")


# -- the cache -------------------------------------------------------------------------------------------------------------


def test_the_cache_is_repeated_selected_and_reset():
    made, ids = model(), tokens()
    expected = made(torch.cat([ids, ids[:, :3]], 1)).logits[:, -3:]
    cache = DynamicCache(config=made.config)
    made(ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert error(made(ids[:, :3].flip(0), past_key_values=cache).logits, expected.flip(0)) < 1e-10
    cache.reset()
    assert cache.get_seq_length() == 0 and error(made(ids, past_key_values=cache).logits, made(ids).logits) < 1e-10


def test_tokens_are_taken_back_where_past_states_are_recorded_or_single_tokens_kept():
    made, ids = model(), tokens(n=100)
    expected = made(ids).logits
    cache = DynamicCache(config=made.config)
    cache.activate_past_recording()
    made(ids[:, :90], past_key_values=cache)
    cache.crop(-20)
    assert cache.get_seq_length() == 70 and cache.is_croppable
    assert error(made(ids[:, 70:], past_key_values=cache).logits, expected[:, 70:]) < 1e-10
    plain = DynamicCache(config=made.config)
    made(ids, past_key_values=plain)
    assert not plain.is_croppable
    with pytest.raises(ValueError, match="can't be taken back by 5 tokens"):
        plain.crop(-5)
    softmax = model(layers=["softmax"], num_hidden_layers=2)
    cache = DynamicCache(config=softmax.config)
    softmax(ids[:, :90], past_key_values=cache)
    cache.crop(-20)
    assert error(softmax(ids[:, 70:], past_key_values=cache).logits, softmax(ids).logits[:, 70:]) < 1e-10


@pytest.mark.parametrize("kind", ["hybrid", "looped", "meta"])
def test_a_cache_is_saved_and_goes_on_elsewhere(kind: str, tmp_path: Path):
    made, ids = model(kind), tokens()
    cache, path = DynamicCache(config=made.config), tmp_path / "cache.safetensors"
    with pytest.raises(ValueError, match="no states to save"):
        save_cache(path, cache, made)
    with torch.no_grad():
        made(ids, past_key_values=cache)
    save_cache(path, cache, made)
    again = load_cache(path, made)
    assert again.get_seq_length() == 40
    assert error(made(ids[:, :5], past_key_values=again).logits, made(torch.cat([ids, ids[:, :5]], 1)).logits[:, -5:]) < 1e-10
    with pytest.raises(ValueError, match="a cache of another model"):
        load_cache(path, model("linear"))


@pytest.mark.slow
def test_training_compiles_into_one_graph():
    made, ids = model("hybrid", torch.float32).train(), tokens()
    found = torch._dynamo.explain(made)(ids, labels=ids, use_cache=False)
    assert found.graph_count == 1 and found.graph_break_count == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deltanet", "kimi-linear", "lightning-attention"])
def test_a_token_costs_the_same_after_a_short_and_a_long_prompt(kind: str):
    made = model("linear", torch.float32, layers=[kind] * 2, hidden_size=128)
    times, sizes = {1024: [], 16384: []}, set()
    caches = {}
    with torch.no_grad():
        for n in times:
            caches[n] = DynamicCache(config=made.config)
            made(tokens(1, n), past_key_values=caches[n], logits_to_keep=1)
            sizes.add(sum(layer.nbytes for layer in caches[n].layers))
        for _ in range(60):  # in turn, so that both meet the same load of the machine
            for n, found in times.items():
                begin = time.perf_counter()
                made(tokens(1, 1), past_key_values=caches[n])
                found.append(time.perf_counter() - begin)
    assert len(sizes) == 1
    assert 0.8 < statistics.median(times[16384]) / statistics.median(times[1024]) < 1.25


def test_a_state_layer_holds_no_keys():
    with pytest.raises(TypeError, match="holds no keys and values"):
        StateLayer().update(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="negative number"):
        StateLayer().crop(3)


# -- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": ["deltanet", "softmax"], "num_hidden_layers": 3}, "layers names 2 mixers and num_hidden_layers is 3"),
        ({"layers": []}, "layers is empty"),
        ({"layers": ["deltanett"]}, "did you mean deltanet"),
        ({"layers": ["snapkv"]}, "acts on the cache phase of a trained model and is no mixer"),
        ({"layers": ["softmax(window=0)"]}, "give at least 1 token"),
        ({"num_attention_heads": 5}, "can't be split among num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "can't share num_key_value_heads=3"),
        ({"layers": ["softmax(kv_from=1)", "softmax"]}, "layer 0 can't read the keys of layer 1"),
        ({"loops": 0}, "loops=0"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        model("linear", **changed)


def test_calls_that_do_not_fit_are_refused():
    made, ids = model(), tokens()
    llama = DynamicCache()
    llama.update(torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8), 0)
    for call, message in (
        (lambda: made(ids, past_key_values=llama), "layers of another model"),
        (lambda: made(ids, attention_mask=torch.ones(2, 3)), r"expected \(2, tokens so far\)"),
        (lambda: made(), "either input_ids or inputs_embeds"),
        (lambda: model("shared", layers=["deltanet", "softmax(kv_from=0)"])(ids), "layer 0 left no keys to read"),
        (lambda: model("shared", layers=["softmax", "softmax(window=4, kv_from=0)"])(ids), "give both the same"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="takes no argument 'indices'"):
        made(ids, indices=3)


def test_mixers_that_see_the_future_are_refused():
    from dataclasses import dataclass

    @register
    @dataclass(frozen=True, kw_only=True)
    class Both(Mixer):
        info = Info(slug="reads-both-ways", phase="mixer", causality="bidirectional")

        def build(self, shape):
            return REGISTRY["softmax"]().build(shape)

    try:
        with pytest.raises(ValueError, match="layer 1 is reads-both-ways, which reads tokens to come"):
            model(layers=["deltanet", "reads-both-ways"])
        with pytest.raises(ValueError, match="joins a bidirectional mixer with one that is not"):
            model(layers=["deltanet & reads-both-ways"])
    finally:
        del REGISTRY["reads-both-ways"]


@pytest.mark.parametrize("other", [{"layers": ["deltanet"] * 4}, {"hidden_size": 48}, {"layers": ["kimi-linear"] * 3}])
def test_a_checkpoint_of_another_config_is_refused(other: dict[str, Any], tmp_path: Path):
    model("hybrid", torch.float32).save_pretrained(tmp_path)
    wrong = SaccadeConfig(**{**SMALL, **KINDS["hybrid"], **other})
    with pytest.raises(ValueError, match="was saved from another configuration"):
        SaccadeForCausalLM.from_pretrained(tmp_path, config=wrong)
