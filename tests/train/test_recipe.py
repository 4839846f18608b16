"""The recipe on a tiny model: the loss falls, a cut run resumes to the same numbers, two processes agree."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from saccade.train.checkpoint import latest_checkpoint, load_checkpoint
from saccade.train.config import Phase, TrainConfig, pocket_config, tiny_config
from saccade.train.muon import Muon
from saccade.train.pocket import build_model, build_optimizers, hidden_states, rate_share, train


def config(out: Path, sources: Path, **changes: Any) -> TrainConfig:
    return replace(tiny_config(out), corpus_roots=(sources,), **changes)


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert train(config(out, sources)) == out / "weights"
    return out


def test_loss_falls(finished: Path):
    losses = [row["loss"] for row in rows(finished)]
    assert len(losses) == 16 and losses[0] > 5.0
    assert sum(losses[-4:]) / 4 < losses[0] - 1.0


def test_weights_load_anywhere(finished: Path):
    model = AutoModelForCausalLM.from_pretrained(finished / "weights")
    tokenizer = AutoTokenizer.from_pretrained(finished / "weights")
    assert model.dtype == torch.bfloat16 and tokenizer("a").input_ids == [1, 100]
    made = json.loads((finished / "weights" / "training.json").read_text())
    assert made["steps"] == 16 and made["tokens"] == 16 * 512 and made["processes"] == 1


@pytest.mark.parametrize("cut", [5, 11])  # before and after the context grows
def test_resumes_to_the_same_losses(finished: Path, sources: Path, tmp_path: Path, cut: int):
    train(config(tmp_path, sources, stop_after=cut))
    assert len(rows(tmp_path)) == cut
    seen: list[dict[str, Any]] = []
    train(config(tmp_path, sources, workers=1), progress=seen.append)
    assert [row["step"] for row in seen] == list(range(cut + 1, 17))
    assert rows(tmp_path) == rows(finished)


def test_rows_after_the_checkpoint_are_written_again(finished: Path, sources: Path, tmp_path: Path):
    train(config(tmp_path, sources, stop_after=4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 99.0}) + "\n")
    train(config(tmp_path, sources))
    assert rows(tmp_path) == rows(finished)


def test_only_the_last_checkpoint_is_kept(finished: Path, sources: Path, tmp_path: Path):
    train(config(tmp_path, sources, stop_after=6, checkpoint_every=2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000006"]
    other = replace(tiny_config(tmp_path), hidden=32)
    found = latest_checkpoint(finished)
    assert found is not None
    with pytest.raises(ValueError, match="other shapes"):
        load_checkpoint(found, build_model(other), [])


@pytest.mark.slow
def test_two_processes(sources: Path, tmp_path: Path):
    script = tmp_path / "launch.py"
    script.write_text(
        "import sys\nfrom dataclasses import replace\nfrom pathlib import Path\n"
        "from saccade.train.config import tiny_config\nfrom saccade.train.pocket import train\n"
        f"train(replace(tiny_config(Path(sys.argv[1])), corpus_roots=(Path({str(sources)!r}),), steps=6))\n"
    )
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run([*command, str(out)], check=True, timeout=240, capture_output=True)
    found = rows(out)
    assert [row["step"] for row in found] == list(range(1, 7)) and found[-1]["loss"] < found[0]["loss"]
    assert json.loads((out / "weights" / "training.json").read_text())["processes"] == 2


def test_time_limit_ends_a_run(sources: Path, tmp_path: Path):
    train(config(tmp_path, sources, steps=None, seconds=0.5))
    assert rows(tmp_path)[-1]["step"] % 10 == 0


def test_hidden_states_are_the_models_own(tmp_path: Path):
    model = build_model(tiny_config(tmp_path)).eval()
    ids = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model.lm_head(hidden_states(model, ids)), model(ids, use_cache=False).logits, atol=1e-6)


def test_rate_schedule(tmp_path: Path):
    recipe = pocket_config(tmp_path)
    assert rate_share(0, 0.0, recipe) == pytest.approx(1 / 100)
    assert rate_share(500, 0.3, recipe) == 1.0
    assert rate_share(5000, 1.0, recipe) == pytest.approx(recipe.final_rate)
    middle = (1 + recipe.decay_from) / 2
    assert rate_share(5000, middle, recipe) == pytest.approx((1 + recipe.final_rate) / 2)


def test_every_parameter_has_one_optimizer(tmp_path: Path):
    model = build_model(tiny_config(tmp_path))
    groups = [
        p for optimizer in build_optimizers(model, tiny_config(tmp_path)) for p in optimizer.param_groups[0]["params"]
    ]
    assert len(groups) == len({id(p) for p in groups}) == len(list(model.parameters()))


def exact_muon(p: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    """The rule of `Muon` for one matrix, written out in float64."""
    p, buffer = p.double(), torch.zeros_like(p, dtype=torch.float64)
    for grad in grads:
        buffer = 0.95 * buffer + 0.05 * grad
        x = 0.05 * grad + 0.95 * buffer
        x = (x.T if x.shape[0] > x.shape[1] else x) / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        x = x.T if p.shape[0] > p.shape[1] else x
        p = p * (1 - lr * 0.1) - lr * 0.2 * max(p.shape) ** 0.5 * x
    return p


def test_muon_is_as_near_to_the_exact_rule_as_torch():
    torch.manual_seed(0)
    shapes = [(8, 16), (16, 8), (8, 16), (12, 12)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    grads = [[torch.randn_like(p) for p in ours] for _ in range(3)]
    exact = [exact_muon(p.detach(), [every[i] for every in grads], 0.01) for i, p in enumerate(ours)]
    a = Muon(ours, lr=0.01)
    b = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for every in grads:
        for p, q, grad in zip(ours, theirs, every, strict=True):
            p.grad, q.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    for p, q, wanted in zip(ours, theirs, exact, strict=True):
        assert (p - wanted).abs().max() <= (q - wanted).abs().max() * 2 + 1e-6
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_bad_configs_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="exactly one"):
        TrainConfig(out=tmp_path)
    with pytest.raises(ValueError, match="rising shares"):
        TrainConfig(out=tmp_path, steps=1, phases=(Phase(until=0.5, context=128, tokens=128, mix=(1, 0, 0, 0, 0)),))
    with pytest.raises(ValueError, match="not a multiple"):
        TrainConfig(out=tmp_path, steps=1, phases=(Phase(until=1.0, context=128, tokens=100, mix=(1, 0, 0, 0, 0)),))
