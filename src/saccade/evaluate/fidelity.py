"""How near a method's attention is to dense attention on the same inputs, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.attach.capture import reading_session
from saccade.core import LayerContext, Prefill
from saccade.evaluate.contenders import Contender
from saccade.evaluate.replay import LayerReplay, probabilities

LONGEST = 2048
LAST = 32


@dataclass
class Fidelity:
    """Per layer. output_error: |out - dense| / |dense| (Euclidean, over the queries that the method acts on). mass: the
    share of dense attention's probability on the keys that were read, the mean over heads and those queries.

    Prefill methods are measured on the prompt's queries, cache and decode methods, and combinations with them, on
    those of the tokens after it. broken: why there are no numbers, or None.
    """

    output_error: list[float] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)
    broken: str | None = None


@torch.no_grad()
def measure(model: PreTrainedModel, ids: Sequence[int], prompt: int, contenders: Sequence[Contender]) -> dict[str, Fidelity]:
    """Fidelity of every contender, by spec, from one dense run over `ids`.

    The first `prompt` tokens are the prompt, at whose end cache policies act; at most LAST of the tokens after it,
    the last ones, are tested one by one, and there must be at least one. Dense contenders are left out.
    """
    if not 0 < prompt < len(ids):
        raise ValueError(f"a prompt of {prompt} tokens in a sequence of {len(ids)}: at least one token must follow the prompt")
    found = {contender.spec: Fidelity() for contender in contenders if not contender.dense}
    shared: dict[str, dict[int, dict[Any, Any]]] = {spec: {} for spec in found}

    def compare(ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        for contender in contenders:
            fidelity = found.get(contender.spec)
            if fidelity is None or fidelity.broken:
                continue
            try:
                error, mass = _layer(LayerReplay(ctx, q, k, v, contender, shared[contender.spec]), out, prompt, contender)
            except Exception as problem:  # one method's failure must not cost the others their numbers
                fidelity.broken = f"{type(problem).__name__}: {problem}"
            else:
                fidelity.output_error.append(error)
                fidelity.mass.append(mass)

    if found:
        device = next(model.parameters()).device
        with reading_session(model, compare):
            model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    return found


def _layer(replay: LayerReplay, dense: Tensor, prompt: int, contender: Contender) -> tuple[float, float]:
    """Error and mass of one layer; dense `(1, Hq, N, Dv)` is dense attention's output."""
    out = replay.feed(0, prompt)
    if contender.evicts:
        return _after_prompt(replay, dense, prompt)
    error, method = _relative_error([out], dense[:, :, :prompt]), replay.runner.prefill
    # a method that attends itself may do it in several passes, or over keys in another order: what ran last is not what it reads
    plain = method is None or type(method).attend is Prefill.attend
    selection = replay.ran(prompt) if plain else replay.chosen(prompt)
    if selection is None:
        return error, 1.0
    return error, float(selection.mass(replay.q[:, :, :prompt], replay.k[:, :, :prompt], replay.ctx.scale).mean())


def _after_prompt(replay: LayerReplay, dense: Tensor, prompt: int) -> tuple[float, float]:
    """Error and mass over the last tokens, read one at a time once the prompt has ended."""
    q, k, n = replay.q, replay.k, dense.shape[2]
    replay.close()
    first = max(prompt, n - LAST)
    if first > prompt:
        replay.feed(prompt, first)
        replay.keep_rest()
    outs, masses = [], []
    for t in range(first, n):
        outs.append(replay.feed(t, t + 1))
        weights = probabilities(q[:, :, t : t + 1], k[:, :, : t + 1], t, replay.ctx.scale, replay.ctx.softcap)[:, 0]
        read = replay.read(t + 1)
        masses.append(float((weights * read.repeat_interleave(weights.shape[0] // read.shape[0], 0)).sum(-1).mean()))
    return _relative_error(outs, dense[:, :, first:]), sum(masses) / len(masses)


def _relative_error(outs: list[Tensor], dense: Tensor) -> float:
    """|out - dense| / |dense|, the pieces of `outs` being rows of dense `(1, Hq, m, Dv)` in order."""
    exact = dense.double()
    return float((torch.cat(outs, 2).double() - exact).norm() / exact.norm().clamp(min=1e-30))
