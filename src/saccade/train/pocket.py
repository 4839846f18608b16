"""The recipe of the pocket model: minutes on one or two GPUs, from the Python sources beside the interpreter.

Muon for the matrices, AdamW for the rest; the context grows in phases; the learning rate warms up, stays, and falls.
The same loop runs alone or under `torchrun`, to a time limit or to a number of steps, and resumes where it stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from saccade.core.files import atomic_write
from saccade.models.pocket import quiet
from saccade.models.pocket.tokenizer import BOS, EOS, PAD, VOCABULARY, build_tokenizer
from saccade.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from saccade.train.config import TrainConfig, pocket_config, tiny_config
from saccade.train.corpus import common_words, load_corpus
from saccade.train.data import TaskMix
from saccade.train.distributed import Ranks, join
from saccade.train.metrics import FILE as METRICS
from saccade.train.metrics import append_row, cut_rows
from saccade.train.muon import Muon
from saccade.train.pieces import SCORED, TAG, Kind
from saccade.train.text import Grammar

__all__ = ["TrainConfig", "pocket_config", "tiny_config", "train"]

AGREE_EVERY = 10  # steps between two looks at the first process's clock
SHARD_BYTES = 13_500_000


def build_model(config: TrainConfig) -> LlamaForCausalLM:
    """The model to train, float32, on the CPU: the one in `config.start`, else an untrained one that follows `config.seed`."""
    if config.start is not None:
        return LlamaForCausalLM.from_pretrained(config.start, dtype=torch.float32, local_files_only=True)
    torch.manual_seed(config.seed)
    llama = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=config.hidden,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.query_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=max(phase.context for phase in config.phases),
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(llama).float()


def build_optimizers(model: LlamaForCausalLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW without weight decay for embeddings and norms."""
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    taken = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        Muon(inner, lr=config.rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(rest, lr=config.rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_share(step: int, progress: float, config: TrainConfig) -> float:
    """The learning rate as a share of `config.rate`: linear warm-up, flat, linear fall to `config.final_rate`."""
    fall = max(0.0, (progress - config.decay_from) / (1 - config.decay_from))
    return min(1.0, (step + 1) / config.warmup_steps) * (1 - (1 - config.final_rate) * min(1.0, fall))


def hidden_states(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """The final hidden states `(B, N, hidden)` of full causal sequences `(B, N)`.

    The decoder's own loop, without its mask and cache code: SDPA's causal flag is all that full sequences need.
    """
    body = model.model
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    hidden = body.embed_tokens(ids)
    angles = body.rotary_emb(hidden, position_ids=positions)
    for layer in body.layers:
        hidden = layer(hidden, position_embeddings=angles, position_ids=positions)
    return body.norm(hidden)


def weighted_loss(hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The mean cross-entropy in nats, weighted by byte."""
    logits = F.linear(hidden, table).float().flatten(0, 1)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def measure(hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor, kinds: Tensor) -> dict[str, float]:
    """Bits per byte of plain text, and by kind and tag the share of the answers whose first byte ranks first.

    The first byte is the sharp measure: the later ones can be found from those before them.
    """
    logits = F.linear(hidden, table).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    right = logits.argmax(-1) == targets
    answers = weights >= SCORED
    answers[:, 1:] &= weights[:, :-1] < SCORED
    out: dict[str, float] = {}
    for code in kinds[answers].unique().tolist():
        name = Kind(code % TAG).name.lower() + (f" {code // TAG}" if code % TAG == Kind.VARIABLES else "")
        out[name] = right[answers & (kinds == code)].float().mean().item()
    plain = (kinds == Kind.TEXT) & (weights > 0)
    if plain.any():
        out["text_bits"] = losses[plain].mean().item() / math.log(2)
    return out


def export(model: LlamaForCausalLM, folder: Path) -> Path:
    """Write the weights in bfloat16, in shards under 14 MB, with the tokenizer: any `from_pretrained` can load it."""
    half = LlamaForCausalLM(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    with quiet():
        half.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    build_tokenizer().save_pretrained(folder)
    return folder


def train(config: TrainConfig, progress: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Train, or go on from the last checkpoint under `config.out`; returns the folder of the exported weights.

    `config.out` receives `metrics.jsonl` (a row every `log_every` steps, measured on the first process's share of the
    batch), `checkpoints/` and `weights/`. `progress` is called with every row. Under `torchrun` every process calls
    this; only the first one writes.
    """
    with join(config.device) as ranks:
        return _Run(config, ranks, progress).go()


class _Run:
    """The state of one call of `train`."""

    def __init__(self, config: TrainConfig, ranks: Ranks, report: Callable[[dict[str, Any]], None] | None) -> None:
        self.config, self.ranks, self.report = config, ranks, report
        text, _ = load_corpus(config.corpus_megabytes, config.corpus_roots)
        self.grammar = Grammar(text, common_words(text))
        self.model = build_model(config).to(ranks.device)  # type: ignore[arg-type]
        self.optimizers = build_optimizers(self.model, config)
        self.params = list(self.model.parameters())
        self.step, self.elapsed, self.tokens = 0, 0.0, 0
        self.phase, self.phase_start = -1, 0
        self.batches: Any = None
        found = latest_checkpoint(config.out)
        if found is not None:
            counters = load_checkpoint(found, self.model, self.optimizers)
            self.step, self.elapsed, self.tokens = counters["step"], counters["elapsed"], counters["tokens"]
            self.phase, self.phase_start = counters["phase"], counters["phase_start"]
        if ranks.rank == 0:
            config.out.mkdir(parents=True, exist_ok=True)
            cut_rows(config.out / METRICS, self.step)  # what came after the checkpoint will be written again
        self.loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = weighted_loss
        if config.compile:
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
            self.loss = torch.compile(weighted_loss, dynamic=False)

    def go(self) -> Path:
        config = self.config
        began = time.monotonic() - self.elapsed
        last = config.steps if config.steps is not None else float("inf")
        share = self._share(began)
        while share < 1.0 and self.step < min(last, config.stop_after or float("inf")):
            self._enter(next(i for i, phase in enumerate(config.phases) if share < phase.until))
            row = self._step(share)
            self.step += 1
            self.tokens += config.phases[self.phase].tokens
            self.elapsed = time.monotonic() - began
            if row is not None:
                self._log(row)
            if self.step % config.checkpoint_every == 0:
                self._save()
            if config.steps is not None or self.step % AGREE_EVERY == 0:
                share = self._share(began)
        self.batches = None
        self._save()
        folder = config.out / "weights"
        if self.ranks.rank == 0:
            export(self.model, folder)
            self._describe(folder)
        return folder

    def _describe(self, folder: Path) -> None:
        device = self.ranks.device
        made = {
            "seconds": round(self.elapsed, 1),
            "steps": self.step,
            "tokens": self.tokens,
            "processes": self.ranks.world,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        with atomic_write(folder / "training.json") as temporary:
            temporary.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")

    def _share(self, began: float) -> float:
        if self.config.steps is not None:
            return self.step / self.config.steps
        return self.ranks.agree((time.monotonic() - began) / (self.config.seconds or 1.0))

    def _enter(self, phase: int) -> None:
        if phase != self.phase:
            self.phase, self.phase_start, self.batches = phase, self.step, None
        if self.batches is not None:
            return
        stage, config, ranks = self.config.phases[phase], self.config, self.ranks
        sequences = stage.tokens // stage.context
        if sequences % ranks.world:
            raise ValueError(f"{sequences} sequences a step cannot be shared by {ranks.world} processes")
        data = TaskMix(
            self.grammar,
            stage.context,
            sequences // ranks.world,
            seed=config.seed,
            mix=stage.mix,
            exam_share=config.exam_share,
            split_share=config.split_share,
            letters=stage.letters,
            first=self.step - self.phase_start,
            rank=ranks.rank,
            world=ranks.world,
        )
        pinned = ranks.device.type == "cuda"
        ahead = 4 if config.workers else None
        loader = DataLoader(data, data.batch, num_workers=config.workers, prefetch_factor=ahead, pin_memory=pinned)
        self.batches = iter(loader)

    def _step(self, share: float) -> dict[str, Any] | None:
        device, config = self.ranks.device, self.config
        rate = config.rate * rate_share(self.step, share, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        ids, weights, kinds = (t.to(device, non_blocking=True) for t in next(self.batches))
        targets, weights = ids[:, 1:].contiguous(), weights[:, 1:].contiguous()
        table = self.model.lm_head.weight
        half = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
        with half, self._attention():
            hidden = hidden_states(self.model, ids[:, :-1].contiguous())
            loss = self.loss(hidden, table, targets, weights)
        loss.backward()
        self.ranks.average_gradients(self.params)
        norm = torch.nn.utils.clip_grad_norm_(self.params, config.clip)
        logged = (self.step + 1) % config.log_every == 0
        row = None
        if logged:
            with half:
                row = measure(hidden.detach(), table, targets, weights, kinds[:, 1:])
            row |= {"loss": loss.item(), "gradient_norm": norm.item(), "rate": rate}
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return row

    def _attention(self) -> AbstractContextManager[Any]:
        # One kernel, named: without flags to choose by, a step can never fall back to a slow one unnoticed.
        if self.config.cudnn and self.ranks.device.type == "cuda":
            return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
        return nullcontext()

    def _log(self, row: dict[str, Any]) -> None:
        if self.ranks.rank:
            return
        context = self.config.phases[self.phase].context
        head = {"step": self.step, "seconds": round(self.elapsed, 2), "tokens": self.tokens, "context": context}
        full = head | {name: round(value, 6) for name, value in row.items()}
        append_row(self.config.out / METRICS, full)
        if self.report is not None:
            self.report(full)

    def _save(self) -> None:
        if self.ranks.rank == 0:
            counters = {"elapsed": self.elapsed, "tokens": self.tokens, "phase": self.phase}
            counters["phase_start"] = self.phase_start
            save_checkpoint(self.config.out, self.step, self.model, self.optimizers, counters)
