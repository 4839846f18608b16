"""attach: methods on a transformers model, for the length of a `with` block."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saccade.attach.layercall import LayerCall
from saccade.attach.layers import LayerRunner
from saccade.attach.masks import mask_call, remember_mask
from saccade.attach.models import attention_modules, check_methods, managed_layers, text_config
from saccade.attach.rebuild import Rebuilder
from saccade.attach.recorded import RecordedSteps, check_recording
from saccade.attach.reduction import Chosen, Reached, Reducer, follow
from saccade.attach.rotary import rotary_of
from saccade.attach.saving import save_cache
from saccade.attach.stats import LayerStats, Stats, summarise
from saccade.cache import KVLayer
from saccade.core import CachePolicy, Decode, Plan, Prefill, PromptReduction
from saccade.ops.attend import IMPLEMENTATIONS

NAME = "saccade"
_SESSIONS: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


class Session:
    """The handle that `with saccade.attach(...) as handle:` gives."""

    def __init__(
        self, model: PreTrainedModel, prefill: Prefill | PromptReduction | None, decode: Decode | None, cache: CachePolicy | None,
        plans: dict[str, Plan], when: Literal["prompt", "call"], impl: str, seed: int, graph: int | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.managed = managed_layers(model)
        check_methods(model, {"prefill": prefill, "decode": decode, "cache": cache})
        for method in (member for given in (prefill, decode, cache) if given is not None for member in given.members):
            if "calibration" in method.info.needs and method.info.slug not in plans:
                raise ValueError(
                    f"{method.info.slug} needs a calibration plan for this model: run "
                    f"`saccade calibrate {method.info.slug} --model M -o plan.safetensors` and pass plan="
                )
        for plan in plans.values():
            plan.check_model(model)
        if when not in ("prompt", "call"):
            raise ValueError(f"when={when!r} is not 'prompt' (compress once the prompt has ended) or 'call' (after every call)")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
        if graph is not None:
            check_recording(graph, decode, cache)
        given = {"prefill": prefill, "decode": decode, "cache": cache}
        self.methods = {phase: method.spec for phase, method in given.items() if method is not None}
        self._rebuilder = Rebuilder.of(model, cache, plans)
        self._reducer = Reducer(model, prefill) if isinstance(prefill, PromptReduction) else None
        prefill = None if isinstance(prefill, PromptReduction) else prefill
        layers = int(text_config(model).num_hidden_layers)
        self._runners = {
            index: LayerRunner(
                layer=index, layers=layers, prefill=prefill, decode=decode, policy=cache, plans=plans, when=when, impl=impl,
                seed=seed, rotary=rotary_of(model, index),
            )
            for index in self.managed
        }  # fmt: skip
        self.steps = None if graph is None else self._recorded(graph)  # counts what was replayed, where steps are recorded
        self._cache: weakref.ref[Cache] | None = None
        self._shared: dict[str, Any] = {}
        self._real: Tensor | None = None
        self._vision: Tensor | None = None
        self._hidden: dict[int, Tensor] = {}  # inputs of the attention modules that are running
        self._reads_hidden = any("hidden" in m.info.needs for given in (prefill, decode, cache) if given is not None for m in given.members)
        self._padded = False  # whether the prompt that was shortened had padding
        self._restore: list[Any] = []
        self._original: Any = None

    # -- the with block ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        if any(_SESSIONS.get(module) is not None for module in attention_modules(self.model)):
            raise ValueError("this model is already attached: leave that block first")
        if NAME not in ALL_ATTENTION_FUNCTIONS._global_mapping:
            AttentionInterface.register(NAME, _attention)
            AttentionMaskInterface.register(NAME, remember_mask)
        own, text = self.model.config, text_config(self.model)
        self._original = text._attn_implementation or "eager"
        self.model.set_attn_implementation(NAME if own is text else {_text_key(own, text): NAME})
        if text._attn_implementation != NAME:
            raise ValueError(f"{type(self.model).__name__} does not use transformers' attention interface and can't be attached")
        for module in attention_modules(self.model):
            _SESSIONS[module] = self
        hook = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._restore = [hook.remove]
        if self._reads_hidden:
            self._restore += [
                module.register_forward_pre_hook(self._note_hidden, with_kwargs=True).remove for module in attention_modules(self.model)
            ]
        if self._reducer is not None or self._rebuilder is not None:
            self._restore.append(self.model.register_forward_hook(self._after_forward).remove)
        if self.steps is not None:
            self._restore.append(self.steps.take(self.model))
        return self

    def __exit__(self, *_: object) -> None:
        own, text = self.model.config, text_config(self.model)
        for module in attention_modules(self.model):
            _SESSIONS.pop(module, None)
        for undo in self._restore:
            undo()
        self.model.set_attn_implementation(self._original if own is text else {_text_key(own, text): self._original})
        for layer in self._live_layers().values():
            layer.before_append = layer.after_crop = None

    # -- for the user ------------------------------------------------------------------------------------------------------

    @property
    def cache(self) -> Cache | None:
        """The cache of the last call, as long as someone holds it."""
        return None if self._cache is None else self._cache()

    def stats(self) -> Stats:
        """Densities, entries held and bytes since the last new cache or `reset()`."""
        if self.steps is not None:
            self.steps.refresh()
        return summarise({index: runner.stats for index, runner in self._runners.items()})

    def reset(self) -> None:
        """Forget the counts so far."""
        for runner in self._runners.values():
            runner.stats = LayerStats()

    @property
    def chosen(self) -> Chosen | None:
        """Which tokens of the last prompt were run, where the method is one that shortens prompts (`chosen.places`, a tensor a row)."""
        return None if self._reducer is None else self._reducer.chosen

    def compress(self, cache: Cache | None = None) -> None:
        """Close the prompt: the cache policy acts now, before any further token is known (query-agnostic compression)."""
        cache = self.cache if cache is None else cache
        if cache is None:
            raise ValueError("there is no cache to compress: run the model on a prompt and keep its past_key_values")
        if self.steps is not None:
            self.steps.close()
        for index, runner in self._runners.items():
            layer = cache.layers[index]
            if isinstance(layer, KVLayer):
                runner.end_prompt(layer)

    def save(self, path: str | Path, cache: Cache | None = None) -> Path:
        """Write the cache of the last call (or `cache`) with all that its methods know of it; `saccade.load_cache` reads it.

        One safetensors file, on the CPU's side. ValueError when there is no cache, or a layer of it can't be saved.
        """
        cache = self.cache if cache is None else cache
        if cache is None:
            raise ValueError("there is no cache to save: run the model on a prompt and keep its past_key_values")
        if self.steps is not None:
            self.steps.close()
        return save_cache(path, cache, self.model, self.methods)

    @contextmanager
    def densely(self) -> Iterator[None]:
        """Inside the block several tokens are read with full attention, and no method takes notice of them."""
        with ExitStack() as stack:
            if self.steps is not None:
                stack.enter_context(self.steps.pause())
            for runner in self._runners.values():
                stack.enter_context(runner.densely())
            yield

    def mark_vision(self, mask: Tensor) -> None:
        """Say which tokens of the next input stand for images or video, `(B, m)` bool: for models given as embeddings, and for trials."""
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise ValueError(f"mark_vision was given {mask.dtype} {tuple(mask.shape)}: expected a bool mask (batch, tokens)")
        self._vision = mask

    # -- transformers' side ------------------------------------------------------------------------------------------------

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = list(inspect.signature(model.forward).parameters)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if kwargs.get("output_attentions"):
            raise ValueError("an attached model does not return attention weights: leave output_attentions off")
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if inputs is None:
            raise ValueError("an attached model needs input_ids or inputs_embeds")
        cache = kwargs.get("past_key_values")
        if cache is None and (kwargs.get("use_cache") is not False) and text_config(self.model).use_cache and "past_key_values" in names:
            cache = kwargs["past_key_values"] = DynamicCache(config=text_config(self.model))
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError(
                f"an attached model takes 2-D attention masks (batch, tokens), not {getattr(mask, 'shape', type(mask).__name__)}"
            )
        m = inputs.shape[1]
        self._shared = {}
        if self._rebuilder is not None:
            self._rebuilder.places = None
        if cache is None:
            self._cache = None
        seen = 0 if cache is None else self._install(cache, mask)
        if mask is not None and mask.shape[1] != seen + m:
            raise ValueError(
                f"the attention mask covers {mask.shape[1]} tokens, the cache and the input together {seen + m}: "
                "pass a mask over all of them"
            )
        new = None if mask is None else mask[:, seen:].bool()
        self._real = None if new is None or bool(new.all()) else new
        live = self._live_layers()
        if live and seen:
            kwargs = follow(kwargs, inputs, live[self.managed[0]], mask)
        elif self._reducer is not None and m > 1:
            kwargs = self._shorten(kwargs, live)
        vision = self._take_vision(kwargs, inputs)
        if self._rebuilder is not None and live:
            kwargs = self._rebuild(kwargs, inputs, live, vision)
        for layer in live.values():
            layer.expect(self._real, vision)
        return (), kwargs

    def _note_hidden(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what goes into a layer's attention; of modules inside one another, what goes into the innermost."""
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        index = getattr(module, "layer_idx", None)
        if isinstance(hidden, Tensor) and isinstance(index, int):
            self._hidden[index] = hidden

    def _shorten(self, kwargs: dict[str, Any], live: dict[int, KVLayer]) -> dict[str, Any]:
        """The arguments with the chosen part of the prompt in place of it."""
        assert self._reducer is not None
        shorter = self._reducer.shorten(kwargs, self._real, self._runners[self._reducer.layer])
        if shorter is not kwargs:
            self._shared = {}
            self._reducer.prepare(live, self._real)
            new = shorter["attention_mask"].bool()
            self._padded, self._real = self._real is not None, None if bool(new.all()) else new
        return shorter

    def _rebuild(self, kwargs: dict[str, Any], inputs: Tensor, live: dict[int, KVLayer], vision: Tensor | None) -> dict[str, Any]:
        """The arguments with dropped tokens that come back in front of the new ones."""
        assert self._rebuilder is not None
        if vision is not None:
            raise ValueError(f"{self._rebuilder.method.info.slug} runs tokens again by their ids, which images don't have: leave them out")
        for index, layer in live.items():
            # a prompt ends before it is asked what was dropped
            self._runners[index].before_append(layer, inputs.shape[1])
        kwargs, self._real = self._rebuilder.extend(kwargs, live, self._real)
        return kwargs

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._rebuilder is not None:
            output = self._rebuilder.settle(output)
        return output if self._reducer is None else self._reducer.settle(output, self._live_layers(), self._runners, self._padded)

    def _take_vision(self, kwargs: dict[str, Any], inputs: Tensor) -> Tensor | None:
        """Which of the new tokens stand for images or video: as marked, else by the model's own placeholder ids."""
        marked, self._vision = self._vision, None
        if marked is not None:
            if tuple(marked.shape) != tuple(inputs.shape[:2]):
                raise ValueError(f"mark_vision was given {tuple(marked.shape)} for an input of {tuple(inputs.shape[:2])}: mark all of it")
            return marked.to(inputs.device)
        ids = kwargs.get("input_ids")
        places = [getattr(self.model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
        places = [place for place in places if isinstance(place, int)]
        if ids is None or not places:
            return None
        vision = torch.isin(ids, torch.tensor(places, device=ids.device))
        return vision if bool(vision.any()) else None

    def _recorded(self, size: int) -> RecordedSteps:
        def obstacle() -> str | None:
            if self._reads_hidden or self._rebuilder is not None:
                return "a method reads the layers' inputs or runs tokens again"
            return None if self._real is None else "the new tokens hold padding"

        return RecordedSteps(self.model.forward, self._runners, self._live_layers, size, obstacle)

    def _install(self, cache: Cache, mask: Tensor | None) -> int:
        """Put KVLayers in place of the plain layers of a dynamic cache; returns the tokens seen."""
        if not isinstance(cache, Cache) or (cache.is_compileable and len(cache.layers) > 0) or cache.offloading:
            raise ValueError(f"an attached model works on a DynamicCache without offloading, not on {type(cache).__name__}")
        if not cache.layers:
            cache.layers = DynamicCache(config=text_config(self.model)).layers
        fresh = self._cache is None or self._cache() is not cache
        for index in self.managed:
            layer = cache.layers[index]
            if not isinstance(layer, KVLayer):
                if type(layer) is not DynamicLayer:
                    raise ValueError(f"layer {index} of the cache is a {type(layer).__name__}: an attached model needs a DynamicCache")
                n = layer.get_seq_length()
                real = None if mask is None or bool(mask[:, :n].all()) else mask[:, :n].bool()
                cache.layers[index] = layer = KVLayer.adopt(layer, real)
            first = cache.layers[self.managed[0]]
            layer.leader = first if isinstance(first, KVLayer) and first is not layer else None
            layer.use_methods(self.methods)
            layer.before_append = partial(self._runners[index].before_append, layer)
            layer.after_crop = partial(self._runners[index].after_crop, layer)
        if fresh:
            self._cache = weakref.ref(cache)
            self.reset()
        return int(cache.get_seq_length(self.managed[0]))

    def _live_layers(self) -> dict[int, KVLayer]:
        cache = self.cache
        if cache is None:
            return {}
        return {index: layer for index in self.managed if isinstance(layer := cache.layers[index], KVLayer)}

    def run(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        """One layer's attention, `(B, N, Hq, Dv)`."""
        index = getattr(module, "layer_idx", None)
        masked = mask_call(mask)
        if index not in self._runners or not getattr(module, "is_causal", True):
            return _original_attention(self._original, module, q, k, v, masked.build(self._original), options)
        if not masked.plainly_causal:
            raise ValueError("an attached model takes plain causal sequences: no packed sequences and no bidirectional blocks")
        scale, softcap = _numbers(module, q, options)
        cache = self.cache
        layer = None if cache is None else cache.layers[index]
        if self._reducer is not None and self._reducer.reaches(index):
            raise Reached(LayerCall(q=q, k=k, v=v, scale=scale, softcap=softcap, real=None, shared={}))
        stored = isinstance(layer, KVLayer) and layer.seen >= q.shape[2] and options.get("use_cache") is not False
        call = LayerCall(
            q=q, k=k, v=v, scale=scale, softcap=softcap, real=self._real, shared=self._shared, hidden=self._hidden.pop(index, None),
            again=None if self._rebuilder is None else self._rebuilder.places,
        )  # fmt: skip
        out = self._runners[index].run(call, layer if stored and isinstance(layer, KVLayer) else None)
        return out.transpose(1, 2).contiguous()


def _text_key(own: Any, text: Any) -> str:
    """Under which name a multimodal configuration holds its language model's."""
    return next(name for name in own.sub_configs if getattr(own, name, None) is text)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface."""
    session = _SESSIONS.get(module)
    if session is None:
        raise ValueError("attention implementation 'saccade' works inside `with saccade.attach(model, ...)` only")
    return session.run(module, query, key, value, attention_mask, options), None


# arguments that carry no arithmetic for a full-attention layer
_HARMLESS = {
    "position_ids", "use_cache", "past_key_values", "output_attentions", "output_hidden_states", "return_dict", "is_causal",
    "logits_to_keep", "labels", "token_type_ids", "mm_token_type_ids", "num_items_in_batch", "sliding_window", "cache_position",
    "position_embeddings", "output_router_logits", "layer_idx", "training",
}  # fmt: skip


def _numbers(module: nn.Module, q: Tensor, options: dict[str, Any]) -> tuple[float, float | None]:
    """Scale and softcap of a call; ValueError for an argument whose effect would be lost."""
    if options.get("dropout"):
        raise ValueError("an attached model has no attention dropout: call model.eval() or set attention_dropout to 0")
    unknown = [
        name for name, value in options.items()
        if value is not None and name not in _HARMLESS and name not in ("dropout", "scaling", "softcap")
    ]  # fmt: skip
    if unknown:
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(unknown)} to attention, which an attached model would have to ignore"
        )
    scale = options.get("scaling")
    return q.shape[-1] ** -0.5 if scale is None else float(scale), options.get("softcap")


def _original_attention(
    name: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """A layer that is left alone runs what the model used before."""
    modeling = inspect.getmodule(type(module))
    eager: Any = getattr(modeling, "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return function(module, q, k, v, mask, **options)[0]
