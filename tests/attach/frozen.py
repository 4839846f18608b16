"""What a CUDA graph does, without a GPU: the tensors of a step are written again, and the host's books stay as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.attach.recorded import Step
from saccade.attach.session import Session
from saccade.parts.growing import Growing


class Frozen:
    """A recorder for `RecordedSteps`. A repeated step meets the host as it was when it was recorded; a step that changes a method's state
    fails."""

    def __init__(self, handle: Session) -> None:
        self.handle = handle

    def __call__(self, step: Step) -> Step:
        before, states = self._books(), self._states()
        out = step()
        assert self._states() == states, "a recorded step has changed a method's state"

        def repeat() -> Any:
            now = self._books()
            self._set(before)
            new = step()
            self._set(now)
            for name, value in new.items():
                if isinstance(value, Tensor):
                    out[name].copy_(value)
            return out

        return repeat

    def _parts(self) -> list[tuple[Any, tuple[str, ...]]]:
        parts: list[tuple[Any, tuple[str, ...]]] = []
        for index, layer in self.handle._live_layers().items():
            tail = layer.tail
            assert tail is not None
            grown = (tail._keys, tail._values, *tail._side.values())
            parts += [(layer, ("seen",)), (tail, ("fresh",)), *((x, ("n",)) for x in grown)]
            parts.append((self.handle._runners[index].stats.decode, ("known", "visible")))
        return parts

    def _books(self) -> list[dict[str, Any]]:
        return [{name: getattr(part, name) for name in names} for part, names in self._parts()]

    def _set(self, books: list[dict[str, Any]]) -> None:
        for (part, _), held in zip(self._parts(), books, strict=True):
            vars(part).update(held)

    def _states(self) -> list[dict[str, tuple[int, int | None]]]:
        """Which objects the states hold, and how long those are that grow."""
        return [
            {name: (id(value), value.n if isinstance(value, Growing) else None) for name, value in layer.states.get(phase, None).items()}
            for layer in self.handle._live_layers().values() for phase in ("decode", "cache", "sequence")
        ]  # fmt: skip
