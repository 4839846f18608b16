"""What `saccade bench prefill|step|mixer --methods ... --lengths ...` asks for, as cases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saccade.bench.case import Case

# on a GPU and on a CPU
LENGTHS = {
    "prefill": {True: "32768,131072", False: "1024,2048"}, "step": {True: "32768,131072", False: "2048"},
    "mixer": {True: "2048,8192,32768,131072", False: "256,2048"},
}  # fmt: skip
SHAPES = {True: "llama-8b", False: "pocket"}
TAKEN = {
    "prefill": ("methods", "lengths", "shape", "inputs", "layers"), "step": ("methods", "lengths", "shape", "layers", "batches", "whole"),
    "mixer": ("methods", "lengths", "layers"),
}  # fmt: skip


def asked_cases(kind: str, asked: dict[str, Any], *, cuda: bool, size: int) -> list[Case]:
    """asked: methods, lengths, shape, inputs, layers, batches and whole as given, those left out absent. size: bytes of a number.

    Raises ValueError where a value does not fit, before anything is measured.
    """
    from saccade.bench import mixer_cases, prefill_cases, step_cases

    for name in asked:
        if name not in TAKEN[kind]:
            raise ValueError(f"--{name} is not for {kind}: it takes {', '.join(f'--{x}' for x in TAKEN[kind])}")
    methods = _split(asked.get("methods"), ";")
    lengths = _numbers("lengths", asked.get("lengths") or LENGTHS[kind][cuda], 256)
    if kind == "mixer":
        return mixer_cases.asked(methods, lengths, layers=asked.get("layers"), size=size, cuda=cuda)
    shape = asked.get("shape") or SHAPES[cuda]
    if kind == "step":
        batches = _numbers("batches", asked.get("batches") or "8", 1)
        layers = asked.get("layers")
        return step_cases.asked(methods, lengths, batches, shape=shape, layers=layers, whole=bool(asked.get("whole")), size=size)
    if "layers" in asked and "inputs" in asked:
        raise ValueError("--inputs is for one attention layer: a model with --layers makes its own queries and keys")
    return prefill_cases.asked(
        methods or prefill_cases.default_methods(), lengths, shape=shape, inputs=asked.get("inputs") or "captured",
        layers=asked.get("layers"), size=size,
    )  # fmt: skip


def _numbers(name: str, text: str, least: int) -> list[int]:
    found = []
    for word in _split(text, ","):
        if not word.isdecimal() or int(word) < least:
            raise ValueError(f"--{name} {text}: {word!r} is no whole number from {least} on")
        found.append(int(word))
    if len(set(found)) < len(found) or not found:
        raise ValueError(f"--{name} {text}: give different numbers, such as 32768,131072")
    return found


def _split(text: str | None, mark: str) -> list[str]:
    return [part.strip() for part in (text or "").split(mark) if part.strip()]
