"""Conversion: the same model before anything changes, lessons that stay in their layers, resuming, saving, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from saccade.train.convert import ConvertConfig, convert, load, transfer_losses
from saccade.train.swap import new_parameters, swap


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def teacher(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(**{
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.25, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}, "attn_implementation": "eager",
        "tie_word_embeddings": True, "max_position_embeddings": 128,
        **options,
    })  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batches(step: int, rows: int) -> Tensor:
    """Sequences in which every token is the one three before it plus one."""
    first = torch.randint(3, 64, (rows, 3), generator=torch.Generator().manual_seed(step))
    return torch.stack([(first[:, i % 3] - 3 + i // 3) % 61 + 3 for i in range(40)], dim=1)


def settings(out: Path, **options: object) -> ConvertConfig:
    given = {"to": "lolcats(window=4)", "out": out, "transfer_steps": 6, "lora_steps": 4, "batch": 4, "rows": 2, "every": 2}
    return ConvertConfig(**{**given, **options})


@pytest.mark.parametrize("options", [{}, {"attention_bias": False, "tie_word_embeddings": False, "head_dim": 16}])
@pytest.mark.parametrize("pattern", ["0:1", "pure"])
@torch.no_grad()
def test_softmax_layers_and_a_window_over_everything_change_nothing(options: dict[str, object], pattern: str):
    model, ids = teacher(**options), batches(0, 2)
    student = swap(model, "lolcats(window=64)", pattern)
    assert float((student(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()) < 2e-4
    assert student.config.specs[0].startswith("softmax(theta=5000.0" if pattern == "0:1" else "lolcats(theta=5000.0")


@torch.no_grad()
def test_layers_of_the_pattern_change_and_the_others_stay():
    student = swap(teacher(), "lolcats(window=4, theta=5000.0)", "at:0,2")
    assert [spec.partition("(")[0] for spec in student.config.specs] == ["softmax", "lolcats", "softmax"]
    assert {name.split(".")[3] for name in new_parameters(student)} == {"1"}


def test_a_lesson_reads_the_teachers_inputs_and_no_other_layer():
    model, ids = teacher(), batches(0, 2)
    student, found = swap(model, "lolcats(window=4)"), []
    first = transfer_losses(model, student, ids, found.append)
    assert len(first) == 3 and all(loss.requires_grad for loss in found)
    with torch.no_grad():
        student.model.stack.blocks[0].mixer.q_map.weight.add_(1.0 * torch.randn(4, 8, 8))
    second = transfer_losses(model, student, ids, lambda loss: None)
    assert second[0] != first[0] and second[1:] == first[1:]
    # without new layers before it, the first layer's error is that of its definition
    mixer: Any = student.model.stack.blocks[0].mixer
    attention: Any = model.model.layers[0].self_attn
    x = student.model.stack.blocks[0].norm(student.model.embed_tokens(ids))
    mixer.o_proj = attention.o_proj = torch.nn.Identity()
    rotary = model.model.rotary_emb(x, torch.arange(40)[None])
    mask = torch.full((40, 40), float("-inf")).triu(1)[None, None]
    truth = attention(hidden_states=x, position_embeddings=rotary, attention_mask=mask)[0]
    assert float((mixer(x)[0] - truth).detach().square().mean()) == pytest.approx(second[0], rel=1e-3)


@pytest.mark.parametrize("to", ["lawcat(rank=4", "still(chunk=4, kept=1"])
def test_other_mixers_are_taught_alike(tmp_path: Path, to: str):
    rows: list[dict[str, Any]] = []
    config = settings(tmp_path, to=to + ")", transfer_steps=25, lora_steps=1)
    student = convert(teacher(attention_bias=False), lambda step, n: batches(0, n), config, rows.append)
    assert student.config.specs == [to + ", theta=5000.0)"] * 3
    assert rows[24]["loss"] < 0.9 * rows[0]["loss"]
    assert load(tmp_path).config.specs == student.config.specs


def test_transfer_trains_what_is_new_and_the_losses_fall(tmp_path: Path):
    model, rows = teacher(), []
    before = {name: p.clone() for name, p in swap(model, "lolcats(window=4)").named_parameters()}
    own = {name: p.clone() for name, p in model.named_parameters()}
    # always the same sequences: their losses can be compared
    student = convert(model, lambda step, n: batches(0, n), settings(tmp_path, transfer_steps=25, lora_steps=0), rows.append)
    new = new_parameters(student)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(new) and len(new) == 9
    assert all(torch.equal(p, own[name]) and p.requires_grad for name, p in model.named_parameters())
    assert all(last < 0.8 * first for first, last in zip(rows[0]["layers"], rows[-1]["layers"], strict=True)), rows
    assert [row["step"] for row in rows] == list(range(1, 26))


def test_the_second_stage_lowers_the_loss_and_the_result_opens_again(tmp_path: Path):
    model, rows = teacher(), []
    student = convert(model, batches, settings(tmp_path, lora_steps=16, lora_rate=1e-2), rows.append)
    tuned = [row["loss"] for row in rows if row["stage"] == "tune"]
    assert len(tuned) == 16 and tuned[-1] < tuned[0] - 0.2
    ids = batches(1000, 2)
    with torch.no_grad():
        expected = student(input_ids=ids).logits
        for opened in (load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path / "weights")):
            assert torch.equal(opened(input_ids=ids).logits, expected)
        # one token at a time by the recurrent form
        assert student.generate(ids, max_new_tokens=5, do_sample=False).shape == (2, 45)


@pytest.mark.parametrize("stop", [("transfer", 3), ("transfer", 6), ("tune", 3)])
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(tmp_path: Path, stop: tuple[str, int]):
    whole = convert(teacher(), batches, settings(tmp_path / "whole"))

    def cut(row: dict[str, object]) -> None:
        if (row["stage"], row["step"]) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(teacher(), batches, settings(tmp_path / "cut"), cut)
    rows: list[dict[str, object]] = []
    torch.manual_seed(99)
    again = convert(teacher(), batches, settings(tmp_path / "cut"), rows.append)
    assert len(rows) < 10
    for stage in ("transfer", "tune"):
        curves = [(tmp_path / run / stage / "metrics.jsonl").read_text() for run in ("whole", "cut")]
        assert curves[0] == curves[1] and len(curves[0].splitlines()) == {"transfer": 6, "tune": 4}[stage]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_folder_with_another_run_is_refused(tmp_path: Path):
    first = settings(tmp_path, transfer_steps=1, lora_steps=0)
    convert(teacher(), batches, first)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        convert(teacher(), batches, replace(first, transfer_rate=1e-3))
    with pytest.raises(ValueError, match="holds no converted model"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"to": "lolcat"}, "did you mean"), ({"batch": 3}, "can't be run 2 at"), ({"rank": 0}, "rank is 0"), ({"clip": 0.0}, "above 0")],
)
def test_wrong_settings_are_refused(tmp_path: Path, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **options)


def test_models_and_mixers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="GPT2LMHeadModel can't be converted"):
        swap(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=16)), "lolcats")
    with pytest.raises(ValueError, match="has a scaled rotary embedding"):
        swap(teacher(rope_parameters={"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}), "lolcats")
    with pytest.raises(ValueError, match="angles of base 10000 and the model by 5000"):
        swap(teacher(), "hedgehog")
    with pytest.raises(ValueError, match="at:7 names layer 7"):
        swap(teacher(), "lolcats", "at:7")
