"""What `saccade bench prefill --methods ... --lengths ...` asks for, as cases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saccade.bench.case import Case

LENGTHS = {True: "32768,131072", False: "1024,2048"}  # on a GPU and on a CPU
SHAPES = {True: "llama-8b", False: "pocket"}


def asked_cases(asked: dict[str, Any], *, cuda: bool, size: int) -> list[Case]:
    """asked: methods, lengths, shape, inputs and layers as given, those left out absent. size: bytes of a number.

    Raises ValueError where a value does not fit, before anything is measured.
    """
    from saccade.bench import prefill_cases

    if "layers" in asked and "inputs" in asked:
        raise ValueError("--inputs is for one attention layer: a model with --layers makes its own queries and keys")
    methods = _split(asked.get("methods"), ";") or prefill_cases.default_methods()
    return prefill_cases.asked(
        methods, _lengths(asked.get("lengths") or LENGTHS[cuda]), shape=asked.get("shape") or SHAPES[cuda],
        inputs=asked.get("inputs") or "captured", layers=asked.get("layers"), size=size,
    )  # fmt: skip


def _lengths(text: str) -> list[int]:
    found = []
    for word in _split(text, ","):
        if not word.isdecimal() or int(word) < 256:
            raise ValueError(f"--lengths {text}: {word!r} is no number of tokens from 256 on")
        found.append(int(word))
    if len(set(found)) < len(found) or not found:
        raise ValueError(f"--lengths {text}: give different lengths, such as 32768,131072")
    return found


def _split(text: str | None, mark: str) -> list[str]:
    return [part.strip() for part in (text or "").split(mark) if part.strip()]
