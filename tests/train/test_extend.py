"""Extending a context: stretched positions, what is trained, adapters on disk, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from saccade.cli.main import app
from saccade.models.pocket.tokenizer import build_tokenizer
from saccade.train.config import tiny_config
from saccade.train.extend import (
    ExtendConfig,
    add_adapters,
    choose_trainable,
    extend,
    load_extended,
    load_stretched,
    mean_loss,
    stretched,
    tune,
    windows,
)
from saccade.train.pocket import build_model

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained byte-level model of 64 positions."""
    folder = tmp_path_factory.mktemp("start")
    model = build_model(tiny_config(folder))
    model.config.max_position_embeddings = 64
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def settings(start: Path, out: Path, **changes: object) -> ExtendConfig:
    given = {"start": start, "out": out, "context": 160, "steps": 6, "batch": 2, "rate": 3e-3, "warmup": 2, "device": "cpu", **changes}
    return ExtendConfig(**given)


def ids_of(n: int) -> torch.Tensor:
    return torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(0))


def test_positions_are_divided_by_the_whole_factor(start: Path, tmp_path: Path) -> None:
    plain = load_stretched(settings(start, tmp_path, positions="keep"))
    near = load_stretched(settings(start, tmp_path))
    raised = load_stretched(settings(start, tmp_path, positions="base"))
    frequencies = [m.model.rotary_emb.inv_freq for m in (plain, near, raised)]
    assert torch.allclose(frequencies[1], frequencies[0] / 3)  # 160 over 64, rounded up
    assert frequencies[2][0] == frequencies[0][0] and frequencies[2][-1].item() == pytest.approx(frequencies[0][-1].item() / 3, rel=1e-3)
    assert near.config.max_position_embeddings == 160
    short = stretched(LlamaConfig(max_position_embeddings=64), 32, None, "interpolate")
    assert short.rope_parameters["rope_type"] == "default" and short.max_position_embeddings == 64
    with pytest.raises(ValueError, match="plain one"):
        stretched(near.config, 640, None, "interpolate")


def test_what_is_trained(start: Path, tmp_path: Path) -> None:
    names = {}
    for adapt in ("lora+", "lora", "full"):
        model = load_stretched(settings(start, tmp_path))
        if adapt != "full":
            add_adapters(model, 4, 8)
        choose_trainable(model, adapt)
        names[adapt] = {name for name, p in model.named_parameters() if p.requires_grad}
        if adapt == "full":
            assert names[adapt] == {name for name, _ in model.named_parameters()}
    assert len(names["lora"]) == 2 * 4 * 2 and all("lora_" in name for name in names["lora"])
    more = names["lora+"] - names["lora"]
    norms = {f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")}
    assert more == norms | {"model.norm.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize("adapt", ["lora+", "lora", "full"])
def test_an_adapter_on_disk_gives_the_tuned_model(start: Path, tmp_path: Path, adapt: str) -> None:
    config, ids = settings(start, tmp_path, adapt=adapt), ids_of(2000)
    rows: list[dict] = []
    before = load_stretched(config).eval()
    tuned = tune(load_stretched(config), windows(ids, 160, 0), config, rows.append)
    again = load_extended(start, tmp_path / "adapter.safetensors", device="cpu")
    with torch.no_grad():
        a, b, c = (m(ids[None, :160], use_cache=False).logits for m in (tuned, again, before))
    assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, c, atol=1e-3)
    assert not any("lora" in name for name, _ in again.named_parameters())
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(0.2 < row["density"] < 0.45 for row in rows)  # four groups of a quarter, half of the heads shifted
    with safe_open(tmp_path / "adapter.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["adapter"])["settings"]["method"] == "longlora"


def test_the_loss_falls_and_the_run_depends_on_the_seed_alone(start: Path, tmp_path: Path) -> None:
    ids = torch.arange(3, 35).repeat(80)
    runs: list[list[float]] = []
    for method in ("longlora", "longlora", None):
        rows: list[dict] = []
        config = settings(start, tmp_path, method=method, steps=15, adapt="full")
        tune(load_stretched(config), windows(ids, 160, 1), config, rows.append)
        runs.append([row["loss"] for row in rows])
        assert (rows[0]["density"] is None) == (method is None)
    assert runs[0] == runs[1] != runs[2]
    assert all(run[-1] < run[0] - 0.5 for run in runs)


def test_rows_at_a_time_change_nothing(start: Path, tmp_path: Path) -> None:
    ids, losses = ids_of(2000), []
    for rows in (1, 4):
        told: list[dict] = []
        config = settings(start, tmp_path, batch=4, rows=rows, steps=4)
        tune(load_stretched(config), windows(ids, 160, 0), config, told.append)
        losses.append([row["loss"] for row in told])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_extend_writes_a_model_that_loads_anywhere(start: Path, tmp_path: Path) -> None:
    text = "".join(f"line {i % 10}: the same as ever\n" for i in range(600))
    weights = extend(settings(start, tmp_path, adapt="full", steps=20), text)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["lengths"] == [64, 160] and all(a < b - 0.5 for a, b in zip(report["nats_after"], report["nats_before"], strict=True))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 20
    model, tokenizer = AutoModelForCausalLM.from_pretrained(weights), AutoTokenizer.from_pretrained(weights)
    assert model.config.max_position_embeddings == 160
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    assert mean_loss(model, ids[len(ids) * 9 // 10 :], 160) == pytest.approx(report["nats_after"][1], abs=1e-3)


def test_wrong_settings_are_refused(start: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"context": 0}, "context is 0"), ({"adapt": "some"}, "adapt is 'some'"), ({"batch": 3, "rows": 2}, "give a divisor"),
        ({"method": "longlora(groups=0)"}, "groups=0"), ({"start": tmp_path}, "holds no saved model"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(start, tmp_path, **changes) if "start" not in changes else settings(changes["start"], tmp_path)
    with pytest.raises(ValueError, match="too few for sequences"):
        windows(ids_of(100), 160, 0)
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="can't be read"):
        load_extended(start, tmp_path / "other.safetensors")


def test_the_command(start: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("".join(f"def f{i % 7}(x):\n    return x + {i % 7}\n" for i in range(400)))
    run = CliRunner().invoke
    options = ["--context", "128", "--steps", "3", "--batch", "2", "--rate", "1e-3", "--data", str(data)]
    done = run(app, ["train", "extend", "-o", str(tmp_path / "run"), "--start", str(start), "--method", "sinklora", *options])
    assert done.exit_code == 0, done.output
    assert "nats a token at 128" in done.output and (tmp_path / "run" / "adapter.safetensors").is_file()
    for arguments, message in (
        (["-o", str(tmp_path / "run")], "give --start FOLDER and --context N"),
        (["-o", str(tmp_path / "no" / "run"), "--start", str(start), *options], "does not exist"),
        (["-o", str(tmp_path / "run"), "--start", str(start), *options[:-1], "nowhere.txt"], "nowhere.txt does not exist"),
        (["-o", str(tmp_path / "run"), "--start", str(start), *options, "--method", "longlore"], "did you mean"),
    ):
        failed = run(app, ["train", "extend", *arguments])
        assert failed.exit_code == 2 and message in failed.output, failed.output
