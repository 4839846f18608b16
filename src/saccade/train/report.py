"""What a byte-level model can retrieve, by length: exact match on the exams, bits per byte, and what its heads do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from saccade.core.files import atomic_write
from saccade.models.pocket.tokenizer import BOS, BYTE_OFFSET
from saccade.train import exams
from saccade.train.corpus import common_words, load_corpus
from saccade.train.data import pack
from saccade.train.pieces import SCORED, STATED, Kind, Piece
from saccade.train.text import Grammar

LENGTHS = (2048, 4096, 8192, 16384, 32768)
DEPTHS = tuple((i + 0.5) / 6 for i in range(6))
SEED = 7
SCHEMA = "saccade.pocket-report/1"

# Each exam takes (grammar, rng, length, number of the sample) and returns the pieces and the group it is counted in.
Exam = Callable[[Grammar, Random, int, int], tuple[list[Piece], str]]


def _needle(grammar: Grammar, rng: Random, n: int, i: int) -> tuple[list[Piece], str]:
    depth = DEPTHS[i % len(DEPTHS)]
    return exams.needles(grammar, rng, n, depths=[depth]), f"depth {depth:.2f}"


def _variables(grammar: Grammar, rng: Random, n: int, i: int) -> tuple[list[Piece], str]:
    hops = i % 3 + 1
    return exams.variables(grammar, rng, n, hops), f"hops {hops}"


EXAMS: dict[str, Exam] = {
    "needle": _needle,
    "needle of four": lambda grammar, rng, n, i: (exams.needles(grammar, rng, n, count=4), ""),
    "dictionary": lambda grammar, rng, n, i: (exams.dictionary(grammar, rng, n), ""),
    "copy": lambda grammar, rng, n, i: (exams.copy(grammar, rng, n), ""),
    "variables": _variables,
}


def held_out_grammar(megabytes: float = 250.0) -> tuple[Grammar, bytes]:
    """The grammar over the held-out sources of this machine, and those sources."""
    text, held_out = load_corpus(megabytes)
    return Grammar(held_out, common_words(text)), held_out


@torch.no_grad()
def score(model: PreTrainedModel, pieces: list[Piece], length: int, part: bool) -> float:
    """The share of the scored bytes that rank first given all bytes before them; 1.0 or 0.0 for all unless `part`."""
    ids, weights, _ = pack([(Kind.TEXT, pieces)], length)
    end = int(ids.ne(0).sum())
    spots = (weights[:end] >= SCORED).nonzero().flatten()
    logits = model(ids[None, : end - 1].to(model.device), use_cache=False).logits[0]
    right = (logits[spots.to(model.device) - 1].argmax(-1).cpu() == ids[spots]).float().mean().item()
    return right if part else float(right == 1.0)


def exam_scores(
    model: PreTrainedModel, grammar: Grammar, lengths: Sequence[int] = LENGTHS, samples: int = 48
) -> dict[str, dict[str, Any]]:
    """`{exam: {length: {"score", "samples", "groups": {group: score}}}}`; "copy" counts bytes, others answers.

    The same seed gives the same samples for every model.
    """
    out: dict[str, dict[str, Any]] = {}
    for name, exam in EXAMS.items():
        out[name] = {}
        for n in lengths:
            rng = Random(f"{SEED}/{name}/{n}")
            groups: dict[str, list[float]] = {}
            for i in range(samples):
                pieces, group = exam(grammar, rng, n, i)
                groups.setdefault(group, []).append(score(model, pieces, n, part=name == "copy"))
            every = [x for values in groups.values() for x in values]
            row: dict[str, Any] = {"score": round(sum(every) / len(every), 4), "samples": len(every)}
            if "" not in groups:
                row["groups"] = {group: round(sum(v) / len(v), 4) for group, v in sorted(groups.items())}
            out[name][str(n)] = row
    return out


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, text: bytes, length: int = 16384, excerpts: int = 8) -> float:
    """Mean bits per byte over excerpts of `length` bytes, two lengths apart. Raises ValueError for too short a text."""
    if len(text) < (2 * excerpts - 1) * length:
        raise ValueError(f"{excerpts} excerpts of {length} bytes do not fit a text of {len(text)}; pass a longer one")
    bits: list[float] = []
    for i in range(excerpts):
        cut = text[2 * i * length : (2 * i + 1) * length]
        ids = torch.tensor([[BOS, *(byte + BYTE_OFFSET for byte in cut)]], device=model.device)
        logits = model(ids[:, :-1], use_cache=False).logits[0].float()
        bits.append(F.cross_entropy(logits, ids[0, 1:]).item() / math.log(2))
    return sum(bits) / len(bits)


@torch.no_grad()
def head_roles(model: PreTrainedModel, grammar: Grammar, length: int = 2048) -> dict[str, list[list[float]]]:
    """Per layer and head: "sink", the mean attention on the first token, and "retrieval", from answer to needle.

    The retrieval share is the mean attention mass that the positions which predict the answer put on the value in
    the haystack. Attention is computed densely: keep `length` to a few thousand.
    """
    ids, weights, _ = pack([(Kind.TEXT, exams.needles(grammar, Random(SEED), length, depths=[0.4]))], length)
    end = int(ids.ne(0).sum())
    stated = ((weights[:end] - STATED).abs() < 1e-6).nonzero().flatten()
    answer = (weights[:end] >= SCORED).nonzero().flatten()
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation("eager")
    try:
        inputs = ids[None, : end - 1].to(model.device)
        attentions: Sequence[Tensor] = model(inputs, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    sink = [layer[0, :, length // 4 :, 0].float().mean(-1) for layer in attentions]
    found = [layer[0][:, answer - 1][:, :, stated].float().sum(-1).mean(-1) for layer in attentions]
    return {
        name: [[round(x, 3) for x in layer.tolist()] for layer in rows]
        for name, rows in (("sink", sink), ("retrieval", found))
    }


def write_report(
    folder: str | Path,
    device: str = "cpu",
    lengths: Sequence[int] = LENGTHS,
    samples: int = 48,
    megabytes: float = 250.0,
) -> Path:
    """Score the weights in `folder`, in bfloat16, on held-out sources of this machine; write `folder/report.json`.

    `folder/training.json`, if there, goes into the report. At 32K a GPU is wanted: on two CPU cores a sample takes
    ten seconds.
    """
    place = Path(folder)
    model = LlamaForCausalLM.from_pretrained(place, dtype=torch.bfloat16, local_files_only=True)
    model.to(torch.device(device)).eval()  # type: ignore[arg-type]
    grammar, held_out = held_out_grammar(megabytes)
    report: dict[str, Any] = {"schema": SCHEMA, "model": "pocket", "parameters": model.num_parameters()}
    made = place / "training.json"
    if made.exists():
        report["training"] = json.loads(made.read_text(encoding="utf-8"))
    report |= {"dtype": "bfloat16", **full_report(model, grammar, held_out, lengths, samples)}
    with atomic_write(place / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return place / "report.json"


def full_report(
    model: PreTrainedModel, grammar: Grammar, held_out: bytes, lengths: Sequence[int] = LENGTHS, samples: int = 48
) -> dict[str, Any]:
    """All of the above for one model, ready for JSON."""
    return {
        "scores": exam_scores(model, grammar, lengths, samples),
        "bits_per_byte_16k": round(bits_per_byte(model, held_out), 4),
        "heads": head_roles(model, grammar),
    }
