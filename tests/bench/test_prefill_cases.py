"""What prefill methods are timed on, and that the parts of a method are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from saccade.bench import prefill_cases, prefill_inputs
from saccade.bench.case import Settings
from saccade.bench.prefill_inputs import Shape, concentration, make
from saccade.bench.runner import run_cases
from saccade.cli.main import app
from saccade.core import Prefill, Selection
from saccade.methods import build
from saccade.ops import attend
from saccade.parts.rotary import turn

S = Settings(device="cpu", dtype=torch.float32, budget_ms=1)
SPEC = "minference(columns=0.05, offsets=0.1)"
L = 300


@pytest.fixture(autouse=True)
def short_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prefill_inputs.CAPTURE, False, L)


def original() -> Any:
    return prefill_inputs._capture(L, "cpu", torch.float32)


def method(spec: str) -> Prefill:
    built = build(spec)
    assert isinstance(built, Prefill)
    return built


# -- inputs --------------------------------------------------------------------------------------------------------------


def test_more_heads_and_channels_leave_the_logits_as_they_were() -> None:
    q, k, v = make("captured", Shape(L, 32, 8, 128), S)
    from_q, from_k, from_v, _ = original()
    assert (q.shape, k.shape, v.shape) == ((1, 32, L, 128), (1, 8, L, 128), (1, 8, L, 128))
    for head in range(32):
        pair = head // 4 * 2  # every other of 16 pairs
        logits = q[0, head] @ k[0, head // 4].T * 128**-0.5
        assert torch.allclose(logits, from_q[pair, head % 4 % 3] @ from_k[pair].T * 64**-0.5, atol=1e-4)
        assert torch.equal(v[0, head // 4], from_v[pair].repeat(1, 2))


def test_the_pocket_shape_is_the_capture() -> None:
    q, k, _ = make("captured", Shape(L, 6, 2, 64), S)
    from_q, from_k, _, _ = original()
    assert torch.equal(q[0, 3:], from_q[8]) and torch.equal(k[0], from_k[[0, 8]])


def test_longer_inputs_go_on_with_the_capture_at_real_distances() -> None:
    n = 2 * L
    q, k, v = make("captured", Shape(n, 6, 2, 64), S)
    from_q, from_k, from_v, rotary = original()
    assert torch.allclose(k[0, 0, :L], from_k[0], atol=1e-5) and torch.allclose(q[0, :3, :L], from_q[0], atol=1e-5)
    assert torch.equal(v[0, 0, L : 2 * L - 64], from_v[0, 64:]) and torch.equal(v[0, 0, 2 * L - 64], from_v[0, 64])
    # within a repetition distances are the captured ones, so logits are
    again, once = slice(L, 2 * L - 64), slice(64, L)
    assert torch.allclose(q[0, 0, again] @ k[0, 0, again].T, from_q[0, 0, once] @ from_k[0, once].T, atol=2e-2, rtol=1e-4)
    # between the capture and a repetition the distance is L - 64 longer than it was
    far = turn(from_q[0, 0, once], L - 64, rotary) @ from_k[0].T
    assert torch.allclose(q[0, 0, again] @ k[0, 0, :L].T, far, atol=2e-2, rtol=1e-4)
    assert not torch.allclose(far, from_q[0, 0, once] @ from_k[0].T, atol=1.0)


def test_structured_inputs_hold_what_they_state() -> None:
    n = 4096
    q, k, _ = make("structured", Shape(n, 4, 2, 128), S)
    rows = torch.arange(n - 64, n)
    heavy = k[0, :, :, -1] > 0
    assert 0.005 < float(heavy.float().mean()) < 0.015 and not torch.equal(heavy[0], heavy[1])
    logits = q[0, :, rows] @ k[0].repeat_interleave(2, 0).mT * 128**-0.5
    keys = torch.arange(n)
    p = logits.masked_fill(keys > rows[:, None], -torch.inf).softmax(-1)
    columns = float((p * heavy.repeat_interleave(2, 0)[:, None]).sum(-1).mean())
    near = float((p * ((rows[:, None] - keys < 160) & ~heavy.repeat_interleave(2, 0)[:, None])).sum(-1).mean())
    assert 0.5 < columns < 0.72 and 0.1 < near < 0.3 and 0.7 < columns + near < 0.9


def test_concentration() -> None:
    flat = torch.zeros(1, 2, 1000, 8)
    assert concentration(flat, flat) == pytest.approx(0.9, abs=0.01)
    found = {kind: concentration(*make(kind, Shape(L, 6, 2, 64), S)[:2]) for kind in prefill_inputs.KINDS}
    assert max(found["captured"], found["structured"]) < 0.8 * found["random"]


# -- the parts of a method -----------------------------------------------------------------------------------------------


def test_attention_and_selection_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make("structured", Shape(400, 6, 2, 64), S)
    tape, own_work = prefill_cases.recorded(method(SPEC), q, k, v, "auto")
    whole = tape.returned[0].out
    assert len(tape.calls) == 1 and tape.single is tape.calls[0][0][3] and tape.single is not None
    assert torch.equal(tape.replay()[0].out, whole) and torch.equal(attend(q, k, v, tape.single).out, whole)
    ran = []
    monkeypatch.setattr(prefill_cases, "attend", lambda *a, **o: ran.append(a))
    assert torch.equal(own_work(), whole) and torch.equal(own_work(), whole) and not ran  # chooses, and attends to nothing


class TwoPasses(Prefill):
    """Two halves of the queries, one of them with an option of its own."""

    info = method(SPEC).info

    def select(self, ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return Selection.full(q.shape[2], k.shape[2])

    def attend(self, ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = k.shape[2] // 2
        first = ctx.attend(q[:, :, :half], k[:, :, :half], v[:, :, :half], None)
        return torch.cat([first, ctx.partial(q[:, :, half:], k, v, None, causal=True).out], dim=2)


def test_several_passes_are_all_replayed() -> None:
    q, k, v = make("random", Shape(300, 6, 2, 64), S)
    tape, own_work = prefill_cases.recorded(TwoPasses(), q, k, v, "auto")
    assert len(tape.replay()) == 2 and tape.single is None
    assert torch.allclose(own_work(), attend(q, k, v).out, atol=1e-5)


def test_rows_of_a_layer() -> None:
    cases = [prefill_cases.layer_case(spec, Shape(384, 6, 2, 64), kind, 4) for spec, kind in ((SPEC, "captured"), ("deltallm", "random"))]
    found = run_cases("prefill", "asked", cases, S)["rows"]
    by_name = {(row["case"]["method"], row["contestant"]): row for row in found}
    assert all(row["status"] == "ok" for row in found) and len(found) == 5
    part, whole = by_name[SPEC, "saccade, attention"], by_name[SPEC, "saccade, whole layer"]
    assert part["ok"] is True and part["selection_ms"] > 0 and whole["selection_ms"] is None
    assert part["density"] == whole["density"] < 1 and by_name[SPEC, "SDPA"]["role"] == "dense"
    assert "from dense" in whole["note"] and "of its keys" in whole["note"] and part["case"]["inputs"] == "captured"
    # a method that makes no attention calls shows its whole time only
    assert by_name["deltallm", "saccade, whole layer"]["impl"] == "its own" and ("deltallm", "saccade, attention") not in by_name


def test_density_is_that_of_attach() -> None:
    place = prefill_cases._layer(SPEC, Shape(384, 6, 2, 64), "structured", S)
    q, k, v = make("structured", Shape(384, 6, 2, 64), S)
    tape, _ = prefill_cases.recorded(method(SPEC), q, k, v, "auto")
    assert tape.single is not None and place.density == pytest.approx(tape.single.density())


def test_a_whole_model_runs_the_method_in_every_layer() -> None:
    case = prefill_cases.model_case(SPEC, Shape(300, 4, 2, 32), 3, 4)
    found = run_cases("prefill", "asked", [case], S)["rows"]
    assert [row["status"] for row in found] == ["ok", "ok"] and found[0]["density"] < 0.7 and found[1]["role"] == "dense"
    assert found[0]["case"]["layers"] == 3 and "random weights" in found[0]["note"] and found[0]["flops"] < found[1]["flops"]


# -- the command ---------------------------------------------------------------------------------------------------------


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "prefill", *arguments], env={"COLUMNS": "300"})


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    out, page = tmp_path / "bench.json", tmp_path / "bench.html"
    asked = ["--methods", f"{SPEC}; sampleattention(alpha=0.8)", "--lengths", "256,320", "--device", "cpu", "--inputs", "structured"]
    done = bench(*asked, "--check", "--json", str(out), "--html", str(page))
    assert done.exit_code == 0, done.output + done.stderr
    found = json.loads(out.read_text())
    assert found["op"] == "prefill" and found["grid"] == "asked" and "--inputs structured" in found["command"]
    assert {(row["case"]["n"], row["case"]["method"]) for row in found["rows"]} == {
        (n, spec) for n in (256, 320) for spec in (SPEC, "sampleattention(alpha=0.8)")
    }
    assert "choosing" in done.output and "inputs structured" in done.output and page.read_text().startswith("<!doctype html>")
    again = bench("--methods", SPEC, "--lengths", "256", "--device", "cpu", "--inputs", "structured", "--compare", str(out))
    assert again.exit_code == 0 and f"against {out}" in again.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "snapkv"], "snapkv acts in the cache phase"),
        (["--methods", "minferenc"], "minference"),
        (["--lengths", "100"], "no whole number from 256 on"),
        (["--lengths", "512,512"], "give different numbers"),
        (["--shape", "llama"], "--shape llama is not known"),
        (["--inputs", "real"], "--inputs real is no kind of inputs"),
        (["--layers", "2", "--inputs", "random"], "--inputs is for one attention layer"),
        (["--n", "512"], "--n is not for prefill"),
        (["--grid", "quick", "--methods", "minference"], "--methods is for prefill, step and mixer without a grid"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(words: list[str], message: str) -> None:
    done = bench(*words, "--device", "cpu")
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_other_ops_have_no_methods() -> None:
    done = CliRunner().invoke(app, ["bench", "attend", "--methods", "minference"])
    assert done.exit_code == 2 and "--methods is for prefill" in done.stderr
