"""Steps of one token, recorded as a CUDA graph and replayed: the host launches one thing a step, and not the whole model.

Sizes and addresses in a graph are fixed, so a recording serves `size` tokens. For these the entries that a layer holds, a method's index
and its budget stay as they were; the new tokens are read in full beside what the method chooses (see `saccade.cache.window`). Then the
methods see what has come, cache policies act, and the next recording is made: the first token runs as it is, which brings every index
up to date, the second is recorded, the others are replayed.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from saccade.attach.layers import LayerRunner
from saccade.cache import KVLayer
from saccade.cache.window import Clock, Window
from saccade.core import CachePolicy, Decode
from saccade.parts.merging import LOG_WEIGHT

LEAST = 4  # tokens that a recording serves, at least
Step = Callable[[], Any]
# arguments of a step that change nothing about it, where they are given
_KNOWN = {"input_ids", "position_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep", "return_dict", "cache_position"}


class Recorder(Protocol):
    def __call__(self, step: Step) -> Step:
        """What repeats the work of `step`, which is called once for it, and returns what that call returned, with new contents."""
        ...


class CudaGraphs:
    """Recordings on one device that take turns in the same memory.

    The memory belongs to the graphs that were recorded in it, so the last one stays until the next is there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._place: tuple[Any, Any] | None = None  # the memory and the stream of all recordings
        self._last: Any = None

    def __call__(self, step: Step) -> Step:
        with torch.cuda.device(self.device):
            if self._place is None:
                torch.cuda.empty_cache()  # what the allocator keeps at hand is out of reach while a graph is recorded
                self._place = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            graph, (pool, stream) = torch.cuda.CUDAGraph(), self._place
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                # other threads may use the device meanwhile
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    out = step()
                except BaseException:
                    self._place = self._last = None
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        self._last = graph

        def replay() -> Any:
            with torch.cuda.device(self.device):
                graph.replay()
            return out

        return replay


def check_recording(size: int, decode: Decode | None, policy: CachePolicy | None) -> None:
    """ValueError where steps with these methods can't be recorded."""
    if isinstance(size, bool) or not isinstance(size, int) or size < LEAST:
        raise ValueError(f"graph={size!r} is not a number of tokens that one recording serves: give a whole number of at least {LEAST}")
    if decode is None:
        return
    if not decode.info.recordable:
        raise ValueError(
            f"steps of {decode.info.slug} can't be recorded as a CUDA graph: it waits for the device or keeps something from step to step; "
            "leave graph= out"
        )
    if policy is not None and (policy == decode or any(m.info.encodes for m in policy.members)):
        raise ValueError(
            f"{decode.info.slug} over entries that {policy.info.slug} encodes waits for the device in every step: leave graph= out"
        )


class RecordedSteps:
    """Takes the place of a model's forward: single tokens go through recordings, everything else as before.

    recorded, replayed, plain: how many steps were which; the first of each recording is plain, and what can't be recorded.
    """

    def __init__(
        self, forward: Callable[..., Any], runners: Mapping[int, LayerRunner], live: Callable[[], dict[int, KVLayer]], size: int,
        obstacle: Callable[[], str | None], recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        self._forward, self._runners, self._live, self.size, self._obstacle = forward, runners, live, size, obstacle
        self._recorder, self.paused = recorder, False
        self._chooses = any(runner.decode is not None for runner in runners.values())
        self._placed = "position_ids" in inspect.signature(forward).parameters
        self._current: _Recording | None = None
        self._told: set[str] = set()
        self.recorded = self.replayed = self.plain = 0
        self.given_up: str | None = None  # why a step could not be recorded

    def take(self, model: nn.Module) -> Callable[[], None]:
        """Put this in the place of the model's forward; returns what undoes it."""
        own = vars(model).get("forward")

        @functools.wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        def undo() -> None:
            self.close()
            if own is None:
                del model.forward
            else:
                model.forward = own

        model.forward = forward
        return undo

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids, layers = kwargs.get("input_ids"), self._live()
        if self.paused or args or ids is None or ids.shape[1] != 1 or kwargs.get("use_cache") is False:
            return self._as_before(*args, **kwargs)
        if not layers or any(layer.pending or not layer.seen for layer in layers.values()):
            self.plain += bool(layers)
            return self._as_before(*args, **kwargs)
        why = self._unfit(kwargs, layers, ids)
        if why is not None:
            if why not in self._told:
                self._told.add(why)
                warnings.warn(f"steps are not recorded: {why}", stacklevel=2)
            self.plain += 1
            return self._as_before(**kwargs)
        if self._current is None or not self._current.serves(layers, ids):
            self.close()
            self._current = _Recording(self, layers, ids, kwargs["past_key_values"])
        return self._current.step(ids, kwargs.get("position_ids"))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside the block nothing is recorded or replayed."""
        self.close()
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def close(self) -> None:
        """End the recording at hand: methods and policies take in what has come since it began."""
        if self._current is not None:
            current, self._current = self._current, None
            current.close()

    def refresh(self) -> None:
        """Bring what is known of the layers' sizes up to date."""
        for index, layer in self._live().items() if self._current is not None else ():
            self._runners[index].note_sizes(layer)

    def _as_before(self, *args: Any, **kwargs: Any) -> Any:
        self.close()
        return self._forward(*args, **kwargs)

    def _unfit(self, kwargs: dict[str, Any], layers: dict[int, KVLayer], ids: Tensor) -> str | None:
        """Why this step can't be part of a recording, or None."""
        if self.given_up is not None:
            return self.given_up
        if self._recorder is None and ids.device.type != "cuda":
            return f"the model is on {ids.device}, and CUDA graphs need a CUDA device"
        if torch.is_grad_enabled():
            return "gradients are on; run under torch.no_grad() or torch.inference_mode()"
        if not self._placed or kwargs.get("return_dict") is False:
            return "the model takes no position_ids" if not self._placed else "the call wants a tuple back"
        others = sorted(name for name, value in kwargs.items() if name not in _KNOWN and value is not None and value is not False)
        if others:
            return f"the call has {', '.join(others)}"
        if len(layers) != len(kwargs["past_key_values"].layers):
            return "some layers of this model are not run by saccade (sliding windows, for example)"
        for layer in layers.values():
            if layer.padded or layer.tail is None or layer.tail.real is not None:
                return "rows are run one by one, for padding or for heads that hold different numbers of entries"
            if layer.segments and self._chooses:
                return "the cache holds sealed entries, and a decode method chooses"
            if layer.tail.keys.device != ids.device:
                return f"layers lie on {ids.device} and {layer.tail.keys.device}, and a recording is of one device"
            if LOG_WEIGHT in layer.tail.side:
                return "entries carry weights"
            if layer.facts is not None and layer.facts.layout.kv_heads != layer.tail.keys.shape[1]:
                return "the model stores latents, which it expands itself"
        return self._obstacle()


class _Recording:
    """Steps on a cache whose layers have a window open."""

    def __init__(self, owner: RecordedSteps, layers: dict[int, KVLayer], ids: Tensor, cache: Any) -> None:
        self.owner, self.layers, self.cache = owner, layers, cache
        self.ids, self.positions = ids.clone(), torch.zeros_like(ids)
        self.clock = Clock(ids.device)
        self.steps, self.replay = 0, None
        self.gains: dict[int, tuple[float, float]] = {}
        for layer in layers.values():
            assert layer.tail is not None
            layer.window = Window.behind(layer.tail, layer.seen, owner.size, self.clock)

    @property
    def windows(self) -> list[tuple[int, KVLayer, Window]]:
        return [(index, layer, layer.window) for index, layer in self.layers.items() if layer.window is not None]

    def serves(self, layers: dict[int, KVLayer], ids: Tensor) -> bool:
        """Whether the next step is one of this recording."""
        same = layers.keys() == self.layers.keys() and all(layers[i] is layer for i, layer in self.layers.items())
        if not same or self.steps >= self.owner.size or ids.shape != self.ids.shape or ids.device != self.ids.device:
            return False
        found = self.windows
        return len(found) == len(layers) and all(window.left_by(self.steps, layer.tail, layer.seen) for _, layer, window in found)

    def step(self, ids: Tensor, positions: Tensor | None) -> Any:
        self.clock.set(self.steps)
        self.ids.copy_(ids)
        seen = next(iter(self.layers.values())).seen
        self.positions.fill_(seen) if positions is None else self.positions.copy_(positions.expand_as(self.positions))
        if self.steps == 0:
            self.owner.plain += 1
            out = self._run()
        elif self.replay is None:
            self.owner.recorded += 1
            out = self._first()
        else:
            self.owner.replayed += 1
            for index, layer in self.layers.items():
                layer.count()
                computed, visible = self.gains[index]
                later = self.steps - 1  # a step reads a token more than the one before it
                self.owner._runners[index].stats.decode.add(computed + later, visible + later)
            out = self.replay()
        self.steps += 1
        # what a recording returns is written again by the next step
        return type(out)(**{name: value.clone() if isinstance(value, Tensor) else value for name, value in out.items()})

    def _run(self) -> Any:
        windows = [window for *_, window in self.windows]
        for window in windows:
            window.running = True
        try:
            return self.owner._forward(input_ids=self.ids, position_ids=self.positions, past_key_values=self.cache, use_cache=True)
        finally:
            for window in windows:
                window.running = False

    def _first(self) -> Any:
        """Record a step and run it, and note what a step adds to the counts."""
        counts = {index: self.owner._runners[index].stats.decode for index in self.layers}
        before = {index: (count.computed, count.visible) for index, count in counts.items()}
        held = {index: layer.seen for index, layer in self.layers.items()}
        try:
            self.replay = (self.owner._recorder or graphs_on(self.ids.device))(self._run)
        except RuntimeError as error:  # the recording is given up, and the device goes on
            for index, layer in self.layers.items():
                layer.count(held[index] - layer.seen)
            self.owner.given_up = f"one could not be ({str(error).strip().splitlines()[0]})"
            return self._run()
        out = self.replay()
        self.gains = {index: (count.computed - before[index][0], count.visible - before[index][1]) for index, count in counts.items()}
        return out

    def close(self) -> None:
        self.replay = None
        for index, layer, window in self.windows:
            layer.window = None
            # tokens that were taken back since are not there any more
            left = min(self.steps, window.tail.n - window.begin) if layer.tail is window.tail else 0
            queries = None if window.queries is None or left <= 0 else window.queries[:, :, :left]
            self.owner._runners[index].end_window(layer, queries)


@functools.cache
def graphs_on(device: torch.device) -> CudaGraphs:
    """One for the process, so that the recordings of all models use each other's memory."""
    return CudaGraphs(device)
