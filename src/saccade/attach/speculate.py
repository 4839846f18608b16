"""speculate: a model with sparse attention drafts, the same model with full attention verifies; what is written is dense's own.

A round: gamma tokens are drafted one by one with a decode method; their keys and values are taken back; one dense pass over the last
token and the drafted ones gives the distributions p_1 ... p_{gamma + 1} and leaves its own keys and values in the cache. With drafts
d_1 ... d_gamma from q_1 ... q_gamma,

    greedy       accept while d_i = argmax p_i, then write argmax p at the first place where they differ, or behind the last
    sampling     accept d_i with probability min(1, p_i(d_i) / q_i(d_i)); at the first refusal draw from max(0, p_i - q_i), normalised,
                 behind the last draft from p_{gamma + 1}

and the entries of what was refused are taken back. Rows of a batch share one cache length, so all go as far as the row that accepts least.

Sources: sparse-to-dense, arXiv 2505.19155; the sampling rule is that of speculative decoding.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from saccade.attach.doors import PlanLike, attach
from saccade.attach.models import managed_layers, text_config
from saccade.attach.session import Session
from saccade.attach.stats import Stats
from saccade.core import Decode
from saccade.methods import build


@dataclass(frozen=True, kw_only=True)
class Speculated:
    """What `speculate` wrote and how well the drafts did.

    tokens: int64 `(B, N + new)`, prompt included; rows that ended early are filled with the padding id. drafted, accepted: for each round
    the drafted tokens a row, and how many of these each row wrote that had not ended. passes: dense passes, the prompt's not counted.
    stats: of the run.
    """

    tokens: Tensor
    drafted: list[int]
    accepted: list[list[int]]
    passes: int
    stats: Stats

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted, over all rounds and rows; None when nothing was drafted."""
        drafted = sum(count * len(rows) for count, rows in zip(self.drafted, self.accepted, strict=True))
        return sum(map(sum, self.accepted)) / drafted if drafted else None


@dataclass(kw_only=True)
class _Sampler:
    """How a token is taken from logits `(B, ..., vocab)`; greedy without a generator."""

    generator: torch.Generator | None
    temperature: float
    top_k: int | None
    top_p: float | None

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that tokens are drawn from, of the logits' shape, float32 (float64 for float64); one-hot when greedy."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.generator is None:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k, dim=-1).values[..., -1:], -torch.inf)
        if self.top_p is not None:
            ranked, order = logits.sort(dim=-1, descending=True, stable=True)
            before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
            logits = logits.masked_fill(torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= self.top_p), -torch.inf)
        return logits.softmax(-1)

    def draw(self, probabilities: Tensor) -> Tensor:
        """One token for each row of `(B, vocab)`, `(B,)`."""
        if self.generator is None:
            return probabilities.argmax(-1)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(-1)

    def uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, device=like.device, dtype=like.dtype)


@torch.no_grad()
def speculate(
    model: PreTrainedModel,
    input_ids: Tensor,
    spec: str | Decode = "sparse-to-dense",
    *,
    max_new_tokens: int,
    gamma: int = 9,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    vision: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    plan: PlanLike | None = None,
    **inputs: Any,
) -> Speculated:
    """Write on from `input_ids (B, N)` int64 as the dense model does, in fewer passes over the whole cache.

    spec: the decode method that drafts, any that keeps the whole cache. gamma: tokens drafted a round. do_sample, temperature, top_k,
    top_p: as in `generate`, for draft and verification alike; seed makes a run repeatable. attention_mask `(B, N)`: for prompts padded on
    the left. vision `(B, N)` bool: tokens of images, where the model has no placeholder ids for them. eos_token_id: where a row ends,
    default the model's own. plan: for methods that need one. inputs: further arguments of the prompt's forward pass (images).

    Greedy output equals dense greedy output token for token, but for near ties: a pass over several tokens rounds differently from
    single steps. Sampled tokens follow the dense model's distribution.
    Raises ValueError for methods that drop or re-encode entries and for models with layers that can't take tokens back.
    """
    drafter = _check(model, input_ids, spec, max_new_tokens, gamma, attention_mask)
    sampler = _sampler(input_ids.device, do_sample, temperature, top_k, top_p, seed)
    ends = _ends(model, eos_token_id)
    run = _Run(model, input_ids, attention_mask, sampler, ends, max_new_tokens)
    with attach(model, decode=drafter, plan=plan, seed=seed) as handle:
        if vision is not None:
            handle.mark_vision(vision)
        run.read_prompt(inputs)
        while run.going:
            run.round(handle, min(gamma, run.room - 1))
        return Speculated(
            tokens=run.tokens(), drafted=run.drafted, accepted=run.accepted, passes=len(run.drafted), stats=handle.stats()
        )


@dataclass
class _Run:
    """One batch: `written` holds all that is decided on, the cache the keys of all of it but the last token."""

    model: PreTrainedModel
    prompt: Tensor
    mask: Tensor | None
    sampler: _Sampler
    ends: Tensor
    limit: int
    written: list[Tensor] = field(default_factory=list)  # (B,) each
    drafted: list[int] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = DynamicCache(config=text_config(self.model))
        self.ended = torch.zeros(self.prompt.shape[0], dtype=torch.bool, device=self.prompt.device)

    @property
    def room(self) -> int:
        return self.limit - len(self.written)

    @property
    def going(self) -> bool:
        return self.room > 0 and not bool(self.ended.all())

    def tokens(self) -> Tensor:
        """Prompt and output; what a row wrote after its end is padding."""
        new = torch.stack(self.written, dim=1)
        end = torch.isin(new, self.ends).int()
        over = end.cumsum(1) - end > 0
        new, over = (x[:, ~over.all(0)] for x in (new, over))
        fill = self.model.config.get_text_config(decoder=True).pad_token_id
        fill = fill if isinstance(fill, int) else int(self.ends[0]) if len(self.ends) else 0
        return torch.cat([self.prompt, new.masked_fill(over, fill)], dim=1)

    def read_prompt(self, inputs: dict[str, Any]) -> None:
        accepts = inspect.signature(self.model.forward).parameters
        only_last = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
        logits = self._feed(self.prompt, **inputs, **only_last)
        self._write(self.sampler.draw(self.sampler.probabilities(logits[:, -1])))

    def round(self, handle: Session, gamma: int) -> None:
        """Draft up to gamma tokens, verify them, and write those that are right and one more."""
        token, drafts, shares = self.written[-1], [], []
        for _ in range(gamma):
            share = self.sampler.probabilities(self._feed(token[:, None])[:, -1])
            token = self.sampler.draw(share)
            drafts.append(token)
            shares.append(share)
        if gamma:
            self._take_back(gamma)  # no key of the sparse model stays
        guesses = torch.stack([self.written[-1], *drafts], dim=1)
        with handle.densely():
            exact = self.sampler.probabilities(self._feed(guesses))
        right = self._right(guesses[:, 1:], exact, shares)
        common = int(right.masked_fill(self.ended, gamma).min())
        left = exact[:, common].clone()
        if common < gamma:
            refused = right == common
            rest = (left - shares[common]).clamp(min=0)
            # a draft is refused only where p < q, so something is left of p elsewhere
            left[refused] = rest[refused]
        following = self.sampler.draw(left)
        if common < gamma:
            # rows that had more right than the common part keep their own draft there
            following = torch.where(right > common, drafts[common], following)
            self._take_back(gamma - common)
        self.drafted.append(gamma)
        self.accepted.append((right > common).int().add(common)[~self.ended].tolist())
        for token in [*drafts[:common], following]:
            self._write(token)

    def _right(self, drafts: Tensor, exact: Tensor, shares: list[Tensor]) -> Tensor:
        """How many of the drafts `(B, gamma)` each row accepts, one after the other, `(B,)`."""
        if not shares:
            return torch.zeros_like(self.ended, dtype=torch.int64)
        p, q = (x.gather(-1, drafts.unsqueeze(-1)).squeeze(-1) for x in (exact[:, :-1], torch.stack(shares, dim=1)))
        accepted = self.sampler.uniform(p) * q < p if self.sampler.generator is not None else p > 0
        return accepted.long().cumprod(1).sum(1)

    def _write(self, token: Tensor) -> None:
        self.written.append(token)
        self.ended = self.ended | torch.isin(token, self.ends)

    def _take_back(self, count: int) -> None:
        self.cache.crop(-count)

    def _feed(self, ids: Tensor, **options: Any) -> Tensor:
        """Logits `(B, m, vocab)` of the next tokens `(B, m)`; where there is padding, positions count real tokens only."""
        given: dict[str, Any] = {"input_ids": ids, "past_key_values": self.cache, "use_cache": True, **options}
        if self.mask is not None:
            seen = self.cache.get_seq_length() + ids.shape[1]
            mask = torch.nn.functional.pad(self.mask, (0, seen - self.mask.shape[1]), value=1)
            given |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, seen - ids.shape[1] :]}
        return self.model(**given).logits


def _check(
    model: PreTrainedModel, input_ids: Tensor, spec: str | Decode, max_new_tokens: int, gamma: int, mask: Tensor | None
) -> Decode:
    """The method that drafts; ValueError for what can't be served."""
    method = build(spec)
    info = method.info
    if not isinstance(method, Decode) or info.phase != "decode" or "prefill" in info.also:
        raise ValueError(f"speculate drafts with a decode method, and {info.slug} acts on the prompt or the cache: try 'sparse-to-dense'")
    if info.frees_memory or info.encodes:
        raise ValueError(f"{info.slug} does not keep the cache whole, so nothing is left to verify with: choose a method that only selects")
    layers = int(text_config(model).num_hidden_layers)
    if len(managed_layers(model)) != layers:
        raise ValueError(f"{type(model).__name__} has layers without full attention, which can't take drafted tokens back")
    if input_ids.ndim != 2 or not input_ids.shape[1] or input_ids.dtype != torch.long:
        raise ValueError(f"speculate was given input_ids {input_ids.dtype} {tuple(input_ids.shape)}: expected int64 (batch, tokens)")
    for name, value in (("max_new_tokens", max_new_tokens), ("gamma", gamma)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"speculate got {name}={value!r}: expected a whole number of at least 1")
    if mask is not None and (mask.shape != input_ids.shape or not bool(mask[:, -1].all())):
        raise ValueError(f"speculate was given a mask {tuple(mask.shape)} for ids {tuple(input_ids.shape)}: pad on the left and mask all")
    return method


def _sampler(device: torch.device, do_sample: bool, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> _Sampler:
    if not temperature > 0:
        raise ValueError(f"speculate got temperature={temperature!r}: give a number above 0, or leave do_sample off for greedy output")
    if top_k is not None and top_k < 1:
        raise ValueError(f"speculate got top_k={top_k!r}: expected a whole number of at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"speculate got top_p={top_p!r}: expected a share above 0 and at most 1")
    generator = torch.Generator(device=device).manual_seed(seed) if do_sample else None
    return _Sampler(generator=generator, temperature=temperature, top_k=top_k, top_p=top_p)


def _ends(model: PreTrainedModel, given: int | Sequence[int] | None) -> Tensor:
    """Ids at which a row ends, `(E,)`."""
    config: Any = model.generation_config
    found = given if given is not None else getattr(config, "eos_token_id", None)
    listed = [] if found is None else [found] if isinstance(found, int) else list(found)
    return torch.tensor(listed, dtype=torch.long, device=next(model.parameters()).device)
