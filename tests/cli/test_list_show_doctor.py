from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import saccade
from saccade.catalog import catalog
from saccade.cli.doctor import tested as version_note
from saccade.cli.errors import friendly, one_line
from saccade.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
done = [row.slug for row in catalog().values() if row.done]


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("SACCADE_DEBUG", raising=False)


def run(*arguments: str):
    return CliRunner().invoke(app, arguments)


def rows(*arguments: str) -> list[dict]:
    result = run("list", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: str) -> str:
    """The single line on stderr of a call that must end with exit code 2 and print nothing else."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    everything = os.environ | {"PYTHONPATH": str(ROOT / "src")} | environment
    return subprocess.run([sys.executable, *arguments], env=everything, capture_output=True, text=True, check=False)


def test_list_shows_every_row_on_a_line_of_its_own():
    lines = run("list").stdout.splitlines()
    assert lines[0].split() == ["slug", "family", "kind", "phase", "needs", "status", "claim"]
    assert [line.split()[0] for line in lines[1:-1]] == list(catalog())
    assert lines[-1].startswith(f"{len(catalog())} entries: {len(done)} done, ")
    assert not [line for line in lines if line != line.rstrip()]


def test_list_filters():
    assert {row["family"] for row in rows("--family", "kvcomp")} == {"kvcomp"}
    assert len(rows("--family", "kvcomp")) == 7
    assert {row["phase"] for row in rows("--phase", "decode")} == {"decode"}
    assert "quest" in {row["slug"] for row in rows("--phase", "decode")}
    assert {row["status"] for row in rows("--status", "planned")} == {"planned"}
    assert [row["slug"] for row in rows("--status", "done")] == done
    both = rows("--family", "cache", "--status", "planned")
    assert {(row["family"], row["status"]) for row in both} <= {("cache", "planned")}


def test_list_says_what_the_methods_say():
    from saccade import methods

    for row in rows("--status", "done"):
        info = methods.load(row["slug"]).info
        assert (row["phase"], row["needs"], row["frees_memory"]) == (info.phase, sorted(info.needs), info.frees_memory)
    for need in ("nothing", "queries", "weights", "calibration", "training"):
        expected = [slug for slug in done if need in (methods.load(slug).info.needs or {"nothing"})]
        assert [row["slug"] for row in rows("--needs", need)] == expected


@pytest.mark.parametrize(
    ("option", "value", "offered"),
    [("--family", "caches", "cache, "), ("--phase", "middle", "prefill, decode, cache"),
     ("--needs", "money", "calibration"), ("--status", "maybe", "planned, done")],
)  # fmt: skip
def test_list_refuses_unknown_filters(option: str, value: str, offered: str):
    line = refused("list", option, value)
    assert repr(value) in line and offered in line


def test_a_narrow_terminal_keeps_the_claim(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("list", "--family", "systems").stdout.splitlines()
    assert lines[0].split() == ["slug", "family", "status", "claim"]
    assert max(map(len, lines)) <= 80


def test_show_of_a_planned_paper():
    text = run("show", "kronecker-attention").stdout
    row = catalog()["kronecker-attention"]
    for part in (row.title, "arXiv 2310.04064  https://arxiv.org/abs/2310.04064", row.claim, "planned", "mixer"):
        assert part in text
    assert "use it" not in text and "fields" not in text


@pytest.mark.parametrize("slug", done)
def test_show_of_what_runs_here(slug: str):
    from saccade import methods

    row, cls = catalog()[slug], methods.load(slug)
    text = run("show", slug).stdout
    assert row.title in text and row.evidence in text and row.claim in text
    assert (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0] in text
    for field in dataclasses.fields(cls):
        assert field.name in text
    use = f'saccade.mixer("{slug}"' if cls.info.phase == "mixer" else f'saccade.attach(model, {cls.info.phase}="{slug}"'
    assert use in text
    assert ("plan=plan" in text) == ("calibration" in cls.info.needs)
    page = json.loads(run("show", slug, "--json").stdout)
    assert [field["name"] for field in page["fields"]] == [field.name for field in dataclasses.fields(cls)]
    assert page["frees_memory"] == cls.info.frees_memory


def test_show_names_the_nearest():
    assert "did you mean snapkv" in refused("show", "snapk")
    assert "saccade list" in refused("show", "qqqqqqqq")


def test_doctor_looks_at_everything():
    found = json.loads(run("doctor", "--json").stdout)
    names = {check["name"] for check in found["checks"]}
    assert {"python", "torch", "transformers", "cpu", "bf16 on cpu", "triton", "c++ compiler", "plotly", "jinja2",
            "faiss", "playwright", "chromium", "fla", "sageattention"} <= names  # fmt: skip
    assert any(name.startswith("gpu") for name in names)
    missing = [check for check in found["checks"] if not check["found"] and check["group"] != "machine"]
    assert all(check["install"] and check["note"] for check in missing)
    runs = {(run["op"], run["impl"]): run["runs"] for run in found["runs"]}
    assert {op for op, _ in runs} == {"attend", "decode", "estimate", "scan"} and runs["attend", "reference"] and runs["attend", "cpu"]
    assert len({runs[op, "triton"] for op, _ in runs}) == 1
    assert all(run["why"] for run in found["runs"])
    text = run("doctor").stdout
    assert "what this machine can run" in text and "attend reference" in text


def test_doctor_says_where_a_library_or_a_compiler_is_missing(monkeypatch: pytest.MonkeyPatch):
    from saccade.cli import doctor

    monkeypatch.setattr(doctor, "_installed", lambda package: "")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = json.loads(run("doctor", "--json").stdout)
    plotly = next(check for check in found["checks"] if check["name"] == "plotly")
    assert (plotly["found"], plotly["install"]) == ("", "pip install 'saccade[report]'")
    flex = next(run for run in found["runs"] if run["impl"] == "flex")
    assert not flex["runs"] and "C++ compiler" in flex["why"]


def test_versions_are_held_against_the_tested_range():
    assert version_note("torch", "2.13.0+cpu") == "inside the tested range 2.11 to 2.13"
    assert version_note("torch", "2.10.1").startswith("outside")
    assert version_note("transformers", "5.17.0").startswith("inside")
    assert version_note("transformers", "5.24.0.dev0").startswith("outside")
    assert version_note("transformers", "6.0").startswith("outside")


def test_version_and_unknown_commands():
    assert run("--version").stdout == f"saccade {saccade.__version__}\n"
    result = run("shw")
    assert result.exit_code == 2 and "show" in result.stderr
    assert run("list", "--famly", "cache").exit_code == 2


def test_help_lists_the_commands_and_imports_nothing_heavy():
    code = (
        "import sys; from saccade.cli.main import app; app(['--help'], standalone_mode=False); "
        "print([name for name in ('torch', 'transformers', 'numpy', 'plotly', 'jinja2') if name in sys.modules])"
    )
    ran = program("-c", code)
    *text, heavy = ran.stdout.splitlines()
    assert heavy == "[]", ran.stderr
    for name in ("list", "show", "doctor"):
        assert any(line.strip().startswith(name) for line in text)


def test_debug_gives_the_traceback():
    arguments = ("-m", "saccade.cli.main", "show", "qqqqqqqq")
    plain = program(*arguments)
    assert plain.returncode == 2 and "Traceback" not in plain.stderr and len(plain.stderr.splitlines()) == 1
    for traced in (
        program(*arguments[:2], "--debug", *arguments[2:]),
        program(*arguments, SACCADE_DEBUG="1"),
    ):
        assert traced.returncode == 1 and "Traceback" in traced.stderr and "ValueError" in traced.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "error: two lines"),
        (TypeError("a [bold] word"), "error: a [bold] word"),
        (FileNotFoundError(2, "No such file or directory", "run.json"), "error: run.json: no such file or directory"),
        (PermissionError(13, "Permission denied", "/root/x"), "error: /root/x: permission denied"),
        (ImportError("plotly is missing: pip install 'saccade[report]'"), "error: plotly is missing: pip install"),
        (ValueError(), "error: ValueError"),
        (ValueError("long " * 100), "error: " + "long " * 99),
    ],
)
def test_friendly_turns_what_the_user_can_mend_into_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
):
    import typer

    with pytest.raises(typer.Exit) as caught, friendly():
        raise error
    shown = capsys.readouterr()
    assert caught.value.exit_code == 2 and shown.out == ""
    assert shown.err.startswith(line) and shown.err.count("\n") == 1


def test_friendly_leaves_bugs_and_closed_pipes_alone_and_ends_quietly_on_ctrl_c(capsys: pytest.CaptureFixture[str]):
    import typer

    for error in (KeyError("a bug"), RuntimeError("a bug"), BrokenPipeError()):
        with pytest.raises(type(error)), friendly():
            raise error
    with pytest.raises(typer.Exit) as caught, friendly():
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130 and capsys.readouterr().err == ""
    assert one_line(OSError("no space\nleft")) == "no space left"
