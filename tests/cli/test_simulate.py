"""`saccade simulate gna`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from saccade.cli.main import app


def run(*arguments: str):
    return CliRunner().invoke(app, ["simulate", "gna", *arguments])


def test_the_card_s_numbers_as_json() -> None:
    for stride, static, dynamic in ((1, 6.56, 6.56), (64, 6.56, 8.0), (128, 8.0, 8.0)):
        result = run("--grid", "2048", "--window", "256", "--stride", str(stride), "--check", "--json")
        assert result.exit_code == 0
        found = json.loads(result.stdout)
        assert found["flop_bound"] == 8 and found["perfect"] == (stride == 128)
        assert [round(found[name], 2) for name in ("static", "dynamic")] == [static, dynamic]
        assert [round(found[f"measured_{name}"], 2) for name in ("static", "dynamic")] == [static, dynamic]


def test_the_table_and_its_command() -> None:
    result = run("--grid", "8,44,80", "--window", "full,12,24", "--stride", "1,4,8", "--tile", "1,4,8", "--causal", "no,no,no")
    assert result.exit_code == 0 and "FLOP bound" in result.stdout and "12.22" in result.stdout
    command = result.stdout.splitlines()[-1]
    assert command.startswith("saccade simulate gna --grid 8,44,80 --window 8,12,24 --stride 1,4,8")
    again = run(*command.split()[3:])
    assert again.stdout == result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--grid", "8,x", "--window", "3"), "--grid got 'x'"),
        (("--grid", "8,8", "--window", "9"), "window of 9"),
        (("--grid", "8,8", "--window", "3", "--causal", "maybe"), "--causal got 'maybe'"),
        (("--grid", "8,8", "--window", "3", "--tile", "2,2,2"), "--tile 2,2,2 does not fit"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
