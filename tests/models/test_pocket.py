"""The pocket model in the package: its tokenizer and what the trained weights can do."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from saccade.models.pocket import path, pocket
from saccade.models.pocket.tokenizer import BOS, BYTE_OFFSET, build_tokenizer
from saccade.train import exams
from saccade.train.report import score
from saccade.train.text import Grammar

SHARD_LIMIT = 14_000_000


@pytest.fixture(scope="module")
def model():
    return pocket(torch.float32, "cpu")[0]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(path(), local_files_only=True)


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    rng = Random(0)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(4, 9))) for _ in range(400)]
    lines = (f"    {rng.choice(words)} = {rng.choice(words)}({rng.choice(words)})\n" for _ in range(3000))
    return Grammar("".join(lines).encode(), words)


def test_tokenizer_ids(tokenizer: PreTrainedTokenizerFast):
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == tokenizer.vocab_size == 320
    assert tokenizer("Az\n").input_ids == [1, 65 + 3, 122 + 3, 10 + 3]
    assert tokenizer("A", add_special_tokens=False).input_ids == [68]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " leading and trailing ",
        "\n\n\ttabs\r\n",
        "emoji 😀 é 漢字",
        "<bos><pad></s><unused_300>",
        "\x00\x7f",
        "it 's a . test ,",
    ],
)
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerFast, text: str):
    ids = tokenizer(text).input_ids
    assert ids == [BOS, *(byte + BYTE_OFFSET for byte in text.encode())]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_tokenizer_round_trips_any_text(text: str):
    ids = _built().encode(text)
    assert ids == [BOS, *(byte + BYTE_OFFSET for byte in text.encode())]
    assert _built().decode(ids[1:]) == text


def _built(cache: list[PreTrainedTokenizerFast] = []) -> PreTrainedTokenizerFast:  # noqa: B006 - hypothesis and fixtures do not mix
    if not cache:
        cache.append(build_tokenizer())
    return cache[0]


def test_partial_utf8_decodes_to_the_replacement_character(tokenizer: PreTrainedTokenizerFast):
    half = [byte + BYTE_OFFSET for byte in "a😀".encode()[:3]]
    assert tokenizer.decode(half).startswith("a\ufffd")
    assert tokenizer.decode([255 + BYTE_OFFSET, 300]).startswith("\ufffd")


def test_padding_is_on_the_left(tokenizer: PreTrainedTokenizerFast):
    batch = tokenizer(["a", "bcd"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[0, 0, 1, 100], [1, 101, 102, 103]]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_saved_tokenizer_is_the_built_one():
    saved = json.loads((path() / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved == json.loads(build_tokenizer().backend_tokenizer.to_str())


def test_shards_are_small():
    shards = sorted(path().glob("*.safetensors"))
    assert shards and max(shard.stat().st_size for shard in shards) < SHARD_LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pocket_loads_in_both_dtypes(dtype: torch.dtype):
    model, tokenizer = pocket(dtype, "cpu")
    assert model.dtype == dtype and not model.training and model.device.type == "cpu"
    assert model.config.vocab_size == len(tokenizer)
    logits = model(**tokenizer("import os\n", return_tensors="pt")).logits
    assert logits.shape == (1, 11, 320) and logits.isfinite().all()


def test_default_dtype_on_a_cpu_is_float32():
    assert pocket(device="cpu")[0].dtype == torch.float32


def test_auto_model_loads_the_folder(model):
    other = AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32, local_files_only=True)
    ids = torch.randint(3, 259, (1, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        pocket(torch.int8, "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            pocket(device="cuda")


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_answers_a_needle(model, grammar: Grammar, depth: float):
    assert score(model, exams.needles(grammar, Random(3), 1024, depths=[depth]), 1024, part=False) == 1.0


def test_generates_the_needle(model, tokenizer: PreTrainedTokenizerFast, grammar: Grammar):
    text = grammar.haystack(Random(1), 700).decode()
    prompt = (
        text[:300]
        + "\nThe secret code for amber-falcon is 7304915.\n"
        + text[300:]
        + "\nQuestion: What is the secret code for amber-falcon?\nAnswer: The secret code for amber-falcon is "
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0, inputs.input_ids.shape[1] :]) == "7304915."


def test_copies_a_passage(model, grammar: Grammar):
    assert score(model, exams.copy(grammar, Random(4), 1024), 1024, part=True) > 0.95
