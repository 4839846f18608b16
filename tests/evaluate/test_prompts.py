"""Prompts have the asked number of tokens, with the byte tokenizer and with one of merges."""

from __future__ import annotations

from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from saccade.evaluate.prompts import Codec, check_length, prompt_of
from saccade.evaluate.tasks import TASKS, build
from saccade.evaluate.text import grammar, shipped_text


@cache
def merging_codec() -> Codec:
    """A byte-pair tokenizer of 600 entries, trained on the text, that starts sequences with two specials."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "<m>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([shipped_text()[:100_000].decode()], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> <m> $A </s>", special_tokens=[("<s>", 0), ("<m>", 1), ("</s>", 2)])
    return Codec(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))


@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.parametrize("length", [600, 1024])
def test_byte_prompts_are_exact(codec: Codec, name: str, length: int) -> None:
    for index in range(4):
        prompt = prompt_of(build(name), codec, grammar(), length=length, seed=0, index=index)
        assert prompt.length == length == len(prompt.context) + len(prompt.question)
        assert prompt.context[0] == 1, "every sequence of the pocket model starts with bos"
        assert codec.decode(prompt.context) == prompt.sample.context
        assert codec.decode(prompt.question) == prompt.sample.question


@pytest.mark.parametrize("name", sorted(TASKS))
def test_prompts_of_a_merging_tokenizer_are_exact(name: str) -> None:
    codec = merging_codec()
    assert codec.prefix == [0, 1]
    for length in (700, 1500):
        prompt = prompt_of(build(name), codec, grammar(), length=length, seed=0, index=0)
        assert prompt.length == length
        assert len(prompt.sample.context + prompt.sample.question) > length, "this tokenizer merges"
        assert prompt.context[:2] == [0, 1] and 2 not in prompt.context


def test_prompts_depend_on_seed_length_and_index_alone(codec: Codec) -> None:
    def sample(**changes: int) -> object:
        return prompt_of(build("needle"), codec, grammar(), **{"length": 512, "seed": 0, "index": 0, **changes}).sample

    assert sample() == sample()
    assert len({sample(), sample(seed=1), sample(length=513), sample(index=1)}) == 4


def test_lengths_below_the_minimum_are_refused(codec: Codec) -> None:
    task = build("needle")
    check_length(task, codec, grammar(), task.minimum + 1)
    with pytest.raises(ValueError, match=f"length {task.minimum} is below the minimum of task needle"):
        check_length(task, codec, grammar(), task.minimum)
    with pytest.raises(ValueError, match="below the minimum"):
        prompt_of(task, codec, grammar(), length=20, seed=0, index=0)
    # with merges fewer tokens do
    check_length(task, merging_codec(), grammar(), task.minimum - 20)
    with pytest.raises(ValueError, match="below the minimum"):
        check_length(task, merging_codec(), grammar(), 40)
