"""Spec strings: `"snapkv(budget=0.25, window=64)"` names a method with arguments, parsed as literals, never evaluated."""

from __future__ import annotations

import ast
import math
import re
from typing import Any

from saccade.core.budget import Mass, Threshold

_CALLS = {"Mass": Mass, "Threshold": Threshold}
_SLUG = re.compile(r"[a-z0-9][a-z0-9.\-]*")
_SHOWN = 120  # characters of a spec that an error message repeats


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """`"slug(field=literal, ...)"` to `(slug, fields)`.

    Values are Python literals, `Mass(x)` or `Threshold(x)`. Raises ValueError, in one sentence, on anything else.
    """
    if not isinstance(spec, str):
        raise TypeError(f"a method is named by a string such as 'snapkv(budget=0.25)', not by {type(spec).__name__}")
    text, shown = spec.strip(), _shown(spec)
    match = _SLUG.match(text)
    if not match:
        raise ValueError(f"{shown} does not start with a method's name: write it like 'snapkv' or 'snapkv(budget=0.25)'")
    slug, rest = match.group(), text[match.end() :].strip()
    if not rest:
        return slug, {}
    if not (rest.startswith("(") and rest.endswith(")")):
        raise ValueError(f"{shown} is not a method with arguments: write them like '{slug[:_SHOWN]}(budget=0.25)'")
    source = f"f{rest}"
    try:
        call = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two: nested too deeply for the parser
        raise ValueError(f"the arguments in {shown} can't be read: write name=value, separated by commas") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError(f"every argument in {shown} needs its name: write name=value")
    lines = re.split("\r\n|\r|\n", source)
    if (call.end_lineno, call.end_col_offset) != (len(lines), len(lines[-1].encode())):  # a comment hides the last bracket
        raise ValueError(f"{shown} goes on after its arguments: end it with the closing bracket")
    fields: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError(f"{shown} unpacks its arguments: write them out as name=value")
        if keyword.arg in fields:
            raise ValueError(f"{shown} gives {keyword.arg} twice")
        fields[keyword.arg] = _literal(keyword.value, keyword.arg, shown)
    return slug, fields


def _literal(node: ast.expr, name: str, shown: str) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS and not node.keywords:
        arguments = [_literal(argument, name, shown) for argument in node.args]
        if len(arguments) != 1:
            raise ValueError(f"{node.func.id} in {shown} takes one number")
        return _CALLS[node.func.id](arguments[0])
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{name} in {shown} is not a literal: give a number, a string in quotes, True, False, None or a tuple") from None


def _shown(spec: str) -> str:
    return repr(spec) if len(spec) <= _SHOWN else f"{spec[:_SHOWN]!r}..."


def format_value(value: Any) -> str:
    if isinstance(value, Mass):
        return f"Mass({value.share!r})"
    if isinstance(value, Threshold):
        return f"Threshold({format_value(value.value)})"
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"  # the literal that reads back as infinity
    return repr(value)


def format_spec(slug: str, fields: dict[str, Any]) -> str:
    """The inverse of `parse_spec`."""
    if not fields:
        return slug
    return f"{slug}({', '.join(f'{name}={format_value(value)}' for name, value in fields.items())})"


def split_top_level(text: str, separator: str) -> list[str]:
    """Split at a separator that stands outside brackets and quotes; parts are stripped, empty ones dropped."""
    parts, depth, quote, current, escaped = [], 0, "", "", False
    for character in text:
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == separator and depth == 0 and not quote:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part.strip() for part in [*parts, current] if part.strip()]
