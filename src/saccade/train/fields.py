"""Reading plain data into dataclasses: every key known, every value of the type that the field says."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}


def nearest(name: str, known: Iterable[str]) -> str:
    """What an error says about an unknown name: the nearest ones, else all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(names)}"


def read_fields(kind: type[T], given: Any, where: str, base: Path | None = None) -> T:
    """An object of dataclass `kind` from a mapping, dataclasses inside it from mappings inside; `where` names the place in errors.

    Lists become tuples, whole numbers stand for floats, a text such as "3e-4" (which YAML does not take for a number) too; relative
    paths start from `base`. Raises TypeError for a wrong type, ValueError for unknown or missing keys and what the class refuses.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} is {given!r}, expected a mapping of names to values")
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind) if f.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{where} has no key {name!r}: {nearest(str(name), known)}")
        values[name] = read_value(hints[name], value, f"{where}.{name}", base)
    missing = [name for name, f in known.items() if name not in values and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ValueError(f"{where} lacks {' and '.join(missing)}: add {'it' if len(missing) == 1 else 'them'}")
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None


def read_value(hint: Any, value: Any, where: str, base: Path | None = None) -> Any:
    """`value` as the type `hint`; see `read_fields`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, Union):
        return _read_union(arguments, value, where, base)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise ValueError(f"{where} is {value!r}, expected one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{where} is {value!r}, expected a list")
        kinds = (arguments[0],) * len(value) if len(arguments) == 2 and arguments[1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise ValueError(f"{where} has {len(value)} entries, expected {len(kinds)}")
        return tuple(read_value(kind, entry, f"{where}[{i}]", base) for i, (kind, entry) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"{where} is {value!r}, expected a mapping of names to values")
        return dict(value)
    if is_dataclass(hint):
        return read_fields(hint, value, where, base)  # type: ignore[arg-type]
    return _read_plain(hint, value, where, base)


def _read_union(kinds: tuple[Any, ...], value: Any, where: str, base: Path | None) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    rest = [kind for kind in kinds if kind is not types.NoneType]
    if len(rest) == 1:
        return read_value(rest[0], value, where, base)
    for kind in rest:
        try:
            return read_value(kind, value, where, base)
        except TypeError:
            continue
    raise TypeError(f"{where} is {value!r}, expected {' or '.join(_told(kind) for kind in rest)}")


def _read_plain(hint: Any, value: Any, where: str, base: Path | None) -> Any:
    if hint is Path and isinstance(value, str | Path):
        path = Path(value).expanduser()
        return path if base is None or path.is_absolute() else base / path
    if hint is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise TypeError(f"{where} is {value!r}, expected a number") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(f"{where} is {value!r}, expected {_told(hint)}")
    if isinstance(value, float) and value != value:
        raise ValueError(f"{where} is nan, expected a number")
    return value


def _told(hint: Any) -> str:
    return _NAMES.get(hint) or ("a mapping" if get_origin(hint) is dict else "a list" if get_origin(hint) is tuple else str(hint))
