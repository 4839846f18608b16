"""Libraries that aren't here, played by stand-ins: they get their own layout and give the same outputs; a lost GPU ends nothing else."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from saccade.bench import peers, runner, scan_cases
from saccade.bench.attend_cases import Shape, dense_case
from saccade.bench.case import Settings
from saccade.bench.exact import AttentionCheck
from saccade.ops.scan import scan

CPU = Settings(device="cpu", dtype=torch.float32, budget_ms=1)


def inputs(grad: bool) -> peers.Inputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(1, h, 160, 16, generator=generator) for h in (4, 2, 2, 4))
    leaves = [x.requires_grad_(grad) for x in (q, k, v)]
    return peers.Inputs(*leaves, True, d_out if grad else None)


@pytest.mark.parametrize("grad", [False, True])
def test_flash_attn_gets_tokens_before_heads(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        assert q.shape == (1, 160, 4, 16) and k.shape == (1, 160, 2, 16) and q.is_contiguous()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    x = inputs(grad)
    run = peers._flash(x)
    error, allowed = AttentionCheck.of(x.q, x.k, x.v, d_out=x.d_out).judge(run.outputs(run.call()))
    assert error <= allowed


@pytest.mark.parametrize("grad", [False, True])
def test_a_kernel_without_grouped_heads_gets_them_repeated(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = F.scaled_dot_product_attention

    def no_groups(*tensors: Tensor, enable_gqa: bool, **options: Any) -> Tensor:
        if enable_gqa:
            raise RuntimeError("No available kernel. Aborting execution.")
        return real(*tensors, **options)

    monkeypatch.setattr(peers.F, "scaled_dot_product_attention", no_groups)
    x = inputs(grad)
    run = peers._torch(x, [SDPBackend.MATH])
    assert "repeated" in run.note
    error, allowed = AttentionCheck.of(x.q, x.k, x.v, d_out=x.d_out).judge(run.outputs(run.call()))
    assert error <= allowed


@pytest.mark.parametrize("form", scan_cases.FORMS)
def test_fla_gets_its_layout_and_the_same_problem(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(gates: tuple[str, ...]) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, *given: Tensor, **named: Tensor) -> tuple[Tensor, None]:
            found = {**dict(zip(gates, given, strict=False)), **{key.replace("_gamma", ""): x for key, x in named.items()}}
            g, b = (None if found.get(name) is None else found[name] for name in ("g", "b"))
            g = g if g is None or g.ndim == 1 else g.transpose(1, 2)
            b = b if b is None else b.transpose(1, 2)
            out, _ = scan(*(x.transpose(1, 2) for x in (q, k, v)), log_decay=g, beta=b, impl="chunked")
            return out.transpose(1, 2), None

        return run

    names = {"simple_gla": ("g",), "gla": ("g",), "delta_rule": ("b",), "gated_delta_rule": ("g", "b"), "kda": ("g", "b")}
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    for name, gates in names.items():
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, f"chunk_{name}", stand_in(gates))
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)
    shape = scan_cases.Shape(96, heads=2, dim=16)
    for grad in (False, True):
        x = scan_cases._inputs(form, shape, CPU, grad)
        d_out = torch.randn(1, 96, 2, 16).transpose(1, 2) if grad else None
        run = scan_cases._fla(form, x, d_out)
        raw = run.call()
        (out,) = run.outputs(raw)
        assert out.shape == (1, 2, 96, 16)
        error, allowed = scan_cases.ScanCheck(x).judge((out,))
        assert error <= allowed and (not grad or len(raw) == 1 + len(x.leaves))


def test_absent_and_broken_libraries_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sageattention", None)
    assert peers.library("sageattention")[0] is None and "sageattention" in peers.installed()["sageattention"]
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: (_ for _ in ()).throw(RuntimeError("wrong\nABI")))
    assert peers.library("fla") == (None, "fla does not import: wrong ABI")


def test_what_ran_before_the_gpu_was_lost_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = runner._contest, []

    def second_kills(op: str, case: Any, *more: Any) -> Any:
        seen.append(case)
        if len(seen) == 2:
            raise runner.DeviceLost("an illegal memory access was encountered")
        return real(op, case, *more)

    monkeypatch.setattr(runner, "_contest", second_kills)
    shapes = [Shape(n, heads=2, kv_heads=1, dim=16) for n in (128, 192, 256)]
    rows = runner.run_cases("attend", "quick", [dense_case(shape, size=4) for shape in shapes], CPU)["rows"]
    assert [(row["contestant"], row["status"]) for row in rows] == [
        ("saccade", "ok"), ("SDPA", "ok"), ("saccade", "failed"), ("saccade", "skipped"),
    ]  # fmt: skip
    assert "illegal memory" in rows[2]["note"] and "stopped answering" in rows[3]["note"] and len(seen) == 2


def test_an_error_that_the_gpu_does_not_survive_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gpu = Settings(device="cuda", dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(runner.DeviceLost, match="RuntimeError: boom"):
        runner._reason(RuntimeError("boom"), gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert runner._reason(RuntimeError("boom"), gpu) == ("failed", "RuntimeError: boom")
