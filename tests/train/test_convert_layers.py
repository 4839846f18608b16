"""Converting to lightning layers: which layers stay, that they begin as they were, and that the choice is kept with the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.test_convert import batches, settings, teacher
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import saccade
from saccade.methods.hybrid.minicpm_sala import LightningMixer
from saccade.train.convert import convert, load, transfer, transfer_losses
from saccade.train.layer_choice import Choice, choose_layers, read_choice, selected
from saccade.train.swap import new_parameters, swap, taught_parameters

NAMES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rope_parameters",
    "initializer_range", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip
SMALL = "minicpm-sala(block=4, top=3, local=4, window=4, stride=2, dense=64)"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def converted(model: Any) -> list[int]:
    return [i for i, block in enumerate(model.model.stack.blocks) if isinstance(block.mixer, LightningMixer)]


def pretended(recall: dict[int, float], common: dict[int, float], asked: list[list[int]]) -> Any:
    """A measure that charges so much for each converted layer."""

    def measure(model: PreTrainedModel) -> tuple[float, float]:
        asked.append(converted(model))
        return 0.9 - sum(recall.get(i, 0.0) for i in asked[-1]), 0.8 - sum(common.get(i, 0.0) for i in asked[-1])

    return measure


def with_biases() -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**{name: value for name, value in teacher().config.to_dict().items() if name in NAMES})).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    return model


@pytest.mark.parametrize("make", [teacher, with_biases, lambda: teacher(head_dim=16, tie_word_embeddings=False)])
@torch.no_grad()
def test_layers_that_stay_begin_as_they_were(make: Callable[[], PreTrainedModel]):
    model, ids = make(), batches(0, 2)
    stays = swap(model, SMALL, "0:1")
    assert all("sparse=True" in spec and "rotary=True" in spec and "theta=5000.0" in spec for spec in stays.config.specs)
    assert swap(model, SMALL)(input_ids=ids).logits.isfinite().all()
    assert float((stays(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()) < 2e-4
    # the paper's own sparse layers have no rotary embedding: that is asked for, and is another model
    assert float((swap(model, SMALL[:-1] + ", rotary=False)", "0:1")(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()) > 0.1
    # sparse reading as well, beyond the dense length
    few = swap(model, SMALL.replace("dense=64", "dense=0"), "0:1")
    assert float((few(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()) > 1e-3


@torch.no_grad()
def test_shared_key_heads_are_repeated_for_lightning_layers():
    model = teacher()
    student = swap(model, SMALL, "at:0,2")
    attention, mixer = model.model.layers[1].self_attn, student.model.stack.blocks[1].mixer
    for name in ("k_proj", "v_proj"):
        given, own = (getattr(one, name).weight.unflatten(0, (-1, 8)) for one in (attention, mixer))
        assert torch.equal(own, given[[0, 0, 1, 1]])
    assert torch.equal(mixer.q_proj.weight, attention.q_proj.weight)  # pyright: ignore
    assert student.config.num_key_value_heads == 2


def test_lightning_layers_are_taught_whole_and_those_that_stay_not_at_all(tmp_path: Path):
    model, rows = teacher(), []
    student = swap(model, SMALL, "at:0")
    before = {name: p.clone() for name, p in student.named_parameters()}
    transfer(model, student, lambda step, n: batches(0, n), settings(tmp_path, to=SMALL, transfer_steps=30), rows.append)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(taught_parameters(student)) and {name.split(".")[3] for name in changed} == {"1", "2"}
    assert "model.stack.blocks.1.mixer.o_proj.weight" in changed and not any("mixer.o_proj" in name for name in new_parameters(student))
    assert len(rows[0]["layers"]) == 2
    assert all(last < 0.5 * first for first, last in zip(rows[0]["layers"], rows[-1]["layers"], strict=True)), rows
    # the loss is that of the layers' outputs: without any output on both sides it is zero
    for block, layer in zip(student.model.stack.blocks, model.model.layers, strict=True):
        for projection in (block.mixer.o_proj, layer.self_attn.o_proj):  # pyright: ignore
            projection.weight.data.zero_()  # pyright: ignore
    assert transfer_losses(model, student, batches(0, 2), lambda loss: None) == [0.0, 0.0]


def test_the_layers_whose_recall_suffers_most_for_the_common_sense_they_cost_stay():
    model = teacher(num_hidden_layers=6)
    before, taught, asked = swap(model, SMALL, "0:1"), swap(model, SMALL), []
    mixers = [block.mixer for block in before.model.stack.blocks]
    recall, common = {1: 0.1, 2: 0.3, 3: 0.3, 4: 0.2}, {1: 0.0, 2: 0.29, 3: 0.09, 4: 0.0}
    choice = choose_layers(before, taught, pretended(recall, common, asked), 4)
    assert asked == [[], [1], [2], [3], [4]]
    assert [round(trial.score, 3) for trial in choice.trials] == [10.0, 1.0, 3.0, 20.0]
    assert choice.kept == [0, 1, 4, 5] and (choice.recall, choice.common) == (0.9, 0.8)
    assert [block.mixer for block in before.model.stack.blocks] == mixers
    # gains count as no loss, and between equals the earlier layer stays
    even = choose_layers(before, taught, pretended({1: -0.2}, {2: -0.5}, []), 3)
    assert [trial.score for trial in even.trials] == [0.0] * 4 and even.kept == [0, 1, 5]
    assert choose_layers(before, taught, pretended({}, {}, asked), 2) == Choice([0, 5], 0.9, 0.8, [])


def test_how_many_stay():
    assert [selected("select", n) for n in (2, 4, 8, 32)] == [2, 3, 3, 8]
    assert selected("select:5", 6) == 5 and selected("pure", 6) is None and selected("at:0", 6) is None
    for wrong in ("select:1", "select:7"):
        with pytest.raises(ValueError, match="give from 2 to 6"):
            selected(wrong, 6)


@pytest.mark.slow
def test_the_choice_is_part_of_the_run_and_of_the_model(tmp_path: Path):
    model, asked, rows = teacher(num_hidden_layers=5), [], []
    measure = pretended({3: 0.5, 2: 0.1}, {}, asked)
    config = settings(tmp_path / "whole", to=SMALL)  # select, as this mixer has layers of its own that stay
    student = convert(model, batches, config, rows.append, measure)
    assert len(asked) == 4 and [row["layer"] for row in rows if row["stage"] == "choice"] == [1, 2, 3]
    kinds = ["sparse" if "sparse=True" in spec else "lightning" for spec in student.config.specs]
    assert kinds == ["sparse", "lightning", "lightning", "sparse", "sparse"]
    assert read_choice(tmp_path / "whole" / "layers.json") == [0, 3, 4]
    opened = load(tmp_path / "whole")
    assert opened.config.specs == student.config.specs
    with torch.no_grad():
        ids = batches(99, 2)
        assert torch.equal(opened(input_ids=ids).logits, student(input_ids=ids).logits)
        assert opened.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 44)

    # the same run, cut off behind the choice: it is not made again
    def cut(row: dict[str, Any]) -> None:
        if row["stage"] == "tune" and row["step"] == 3:
            raise KeyboardInterrupt

    again = settings(tmp_path / "cut", to=SMALL)
    with pytest.raises(KeyboardInterrupt):
        convert(model, batches, again, cut, measure)
    calls = len(asked)
    other = convert(model, batches, again, None, measure)
    assert len(asked) == calls and all(map(torch.equal, other.parameters(), student.parameters()))
    (tmp_path / "cut" / "layers.json").write_text("{")
    with pytest.raises(ValueError, match="holds no choice of layers: remove it"):
        convert(model, batches, again, None, measure)


def test_lightning_layers_go_into_the_model_as_they_were_taught(tmp_path: Path):
    model = teacher(num_hidden_layers=4)
    config = settings(tmp_path / "a", to=SMALL, pattern="select:3", lora_steps=0)
    student = convert(model, batches, config, None, pretended({2: 0.5}, {}, []))
    taught = swap(model, SMALL)
    transfer(model, taught, batches, settings(tmp_path / "b", to=SMALL))
    own, other = (one.model.stack.blocks[1].mixer.state_dict() for one in (student, taught))  # pyright: ignore
    assert converted(student) == [1] and own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def test_other_mixers_leave_softmax_where_layers_are_chosen(tmp_path: Path):
    def measure(model: Any) -> tuple[float, float]:
        return 1.0 - 0.1 * ("Lolcats" in type(model.model.stack.blocks[1].mixer).__name__), 1.0

    config = settings(tmp_path, pattern="select:3", transfer_steps=1, lora_steps=0)
    student = convert(teacher(num_hidden_layers=4), batches, config, None, measure)
    assert [spec.partition("(")[0] for spec in student.config.specs] == ["softmax", "softmax", "lolcats", "softmax"]
    with pytest.raises(ValueError, match="needs measure="):
        convert(teacher(), batches, settings(tmp_path / "other", pattern="select"))


@pytest.mark.slow
def test_of_the_pocket_model_the_layer_that_retrieves_stays(tmp_path: Path):
    """Its retrieval heads are in layers 4 and 5."""
    from saccade.evaluate.conversion import judge, lessons
    from saccade.evaluate.text import words
    from saccade.train.corpus import load_corpus

    model, tokenizer = saccade.pocket(dtype=torch.float32)
    text = load_corpus(8.0)[0]
    student = swap(model.requires_grad_(False), "minicpm-sala")
    config = settings(tmp_path, to="minicpm-sala", transfer_steps=24, batch=2)
    transfer(model, student, lessons(tokenizer, text, words(text), 192), config)
    choice = choose_layers(swap(model, "minicpm-sala", "0:1"), student, judge(tokenizer, length=384, samples=3), 3)
    scores = {trial.layer: trial.score for trial in choice.trials}
    assert choice.kept == [0, 5, 7] and scores[5] > 3 * max(score for layer, score in scores.items() if layer != 5), scores
    assert max(scores[4], scores[6]) > 5 * max(scores[2], scores[3]), scores
