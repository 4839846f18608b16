"""Plan: what calibration found comes back, and only for the model it was made for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from saccade.core import LayerContext, Plan, fingerprint
from saccade.core.layout import HeadLayout
from saccade.core.plan import SCHEMA


def model(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 16), nn.LayerNorm(16), nn.Linear(16, 3, bias=False))


def plan(**changes: object) -> Plan:
    return Plan(**{
        "slug": "snapkv", "spec": "snapkv(budget=0.25)", "fingerprint": fingerprint(model()),
        "tensors": {"layer.0.bases": torch.randn(2, 3), "layer.1.ranks": torch.tensor([3, 5])}, "notes": {"tokens": 128, "model": "small"},
        **changes,
    })  # fmt: skip


def test_a_plan_comes_back_whole(tmp_path: Path) -> None:
    made = plan()
    path = tmp_path / "plan.safetensors"
    assert made.save(path) == path
    back = Plan.load(str(path))
    assert (back.slug, back.spec, back.fingerprint, back.notes) == (made.slug, made.spec, made.fingerprint, made.notes)
    assert back.tensors.keys() == made.tensors.keys()
    for name, value in made.tensors.items():
        assert torch.equal(back.tensors[name], value) and back.tensors[name].dtype == value.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


def test_views_and_shared_tensors_are_saved_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    made = plan(tensors={"layer.0.a": whole, "layer.1.a": whole, "layer.2.a": whole.T, "layer.3.a": whole[1], "layer.4.a": whole[:, 1:3]})
    back = Plan.load(made.save(tmp_path / "p"))
    for name, value in made.tensors.items():
        assert torch.equal(back.tensors[name], value), name


def test_an_empty_plan_and_half_precision(tmp_path: Path) -> None:
    assert Plan.load(plan(tensors={}).save(tmp_path / "a")).tensors == {}
    half = Plan.load(plan(tensors={"layer.0.x": torch.ones(2, dtype=torch.bfloat16)}).save(tmp_path / "b"))
    assert half.tensors["layer.0.x"].dtype == torch.bfloat16


def test_tensors_are_found_by_layer_and_name() -> None:
    made = plan()
    assert torch.equal(made.tensor(1, "ranks"), torch.tensor([3, 5]))
    with pytest.raises(ValueError, match="no 'ranks' for layer 0"):
        made.tensor(0, "ranks")


def test_a_plan_serves_only_its_model() -> None:
    made = plan()
    made.check_model(model())
    made.check_model(model().to(torch.bfloat16))  # a cast copy is the same model
    made.check_model(model().requires_grad_(False).eval())
    for other in (model(seed=1), model(width=9), nn.Sequential(model())):
        with pytest.raises(ValueError, match=r"another model \(small\)"):
            made.check_model(other)
    changed = model()
    with torch.no_grad():
        changed[2].weight[0, 0] += 1
    assert fingerprint(changed) != fingerprint(model())


def header(facts: object) -> dict[str, str]:
    return {"plan": facts if isinstance(facts, str) else json.dumps(facts)}


GOOD = {"schema": SCHEMA, "slug": "a", "spec": "a", "fingerprint": "0", "notes": {}}


@pytest.mark.parametrize(
    "metadata",
    [
        None, {}, {"format": "pt"}, header("{"), header([]), header(3), header(None), header({}),
        header({**GOOD, "schema": "saccade.plan/0"}), header({**GOOD, "notes": 3}), header({**GOOD, "slug": 3}),
        *(header({k: v for k, v in GOOD.items() if k != missing}) for missing in GOOD),
    ],
    ids=str,
)  # fmt: skip
def test_other_safetensors_files_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"layer.0.x": torch.ones(1)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="not a saccade plan") as raised:
        Plan.load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04\x95pickle", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"{}      "])
def test_files_that_are_no_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a saccade plan"):
        Plan.load(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no plan at .*gone.*saccade calibrate"):
        Plan.load(tmp_path / "gone")
    with pytest.raises(ValueError, match="no plan at"):
        Plan.load(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        plan().save(tmp_path / "gone" / "plan")


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = plan().save(tmp_path / "plan")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        plan(notes={"when": object()}).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["plan"]


def context(**changes: object) -> LayerContext:
    layout = HeadLayout(query_heads=2, kv_heads=1, head_dim=4, value_dim=4)
    return LayerContext(**{"layer": 1, "layers": 2, "layout": layout, "scale": 0.5, "attend": lambda q, k, v, s: q, **changes})


def test_a_context_finds_its_layers_tensors() -> None:
    assert torch.equal(context(plan=plan()).found("ranks"), torch.tensor([3, 5]))
    with pytest.raises(ValueError, match=r"layer 1 has no calibration plan.*saccade calibrate"):
        context().found("ranks")


def test_a_generator_is_fixed_by_seed_layer_and_tokens() -> None:
    def draw(**changes: object) -> list[float]:
        return torch.rand(4, generator=context(**changes).generator()).tolist()

    assert draw(seed=3, seen=9) == draw(seed=3, seen=9)
    drawn = [draw(seed=s, seen=n, layer=layer) for s in (0, 1, 2**40, 2**70, -1) for n in (0, 5) for layer in (0, 1)]
    assert len({tuple(d) for d in drawn}) == len(drawn)
