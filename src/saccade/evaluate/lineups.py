"""Which methods the quality tables hold, and the specs that bring each of them near a few densities or budgets.

In a spec `{0.25}` stands for that share of the prompt in tokens, `{0.25/64}` for as many blocks of 64 tokens, `{0.25:64}` for tokens in
whole blocks of 64. What a spec really reads is measured; the labels are aims. The densities of methods that look at the data were found on
the pocket model at 4K tokens, those of the aim 0.15 at 16K; fields that count tokens or layers are set for its bytes and its eight layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HOLE = re.compile(r"\{([0-9.]+)(?:([:/])([0-9]+))?\}")

# -- issue: prefill; aims are densities ------------------------------------------------------------------------------------------

PREFILL: dict[str, dict[str, str]] = {
    "sale": {"0.4": "sale(tau=0.02)", "0.2": "sale(tau=0.2)", "0.1": "sale(tau=2.0)", "0.15": "sale(tau=0.08)"},
    "spargeattn": {
        "0.4": "spargeattn(top_k=0.23, block_q=64, block_k=32, theta=-1.0)",
        "0.2": "spargeattn(top_k=0.115, block_q=64, block_k=32, theta=-1.0)",
        "0.1": "spargeattn(top_k=0.055, block_q=64, block_k=32, theta=-1.0)",
        "0.15": "spargeattn(top_k=0.04, block_q=32, block_k=32, theta=0.3)",
    },
    "hip": {
        "0.4": "hip(top_k={0.12:2}, window={0.06}, dense_layers=1)", "0.2": "hip(top_k={0.06:2}, window={0.03}, dense_layers=0)",
        "0.1": "hip(top_k={0.03:2}, window={0.015}, dense_layers=0)",
    },
    "delta-attention": {
        "0.4": "delta-attention(base='streaming-llm(sinks=16, window={0.18})', gamma=64, tail=64)",
        "0.2": "delta-attention(base='streaming-llm(sinks=16, window={0.075})', gamma=64, tail=64)",
        "0.1": "delta-attention(base='streaming-llm(sinks=16, window={0.025})', gamma=64, tail=64)",
    },
    "dhsa": {
        "0.4": "dhsa(budget=0.22, local=64, sinks=16, instruction=32)", "0.2": "dhsa(budget=0.1, local=64, sinks=16, instruction=32)",
        "0.1": "dhsa(budget=0.04, local=64, sinks=16, instruction=32)",
    },
    "deltallm": {
        "0.4": "deltallm(theta=1.0, window=128)", "0.2": "deltallm(theta=2.0, window=128)", "0.1": "deltallm(theta=3.0, window=128)",
    },
    "sampleattention": {
        "0.4": "sampleattention(alpha=0.86, window_share=0.08)", "0.2": "sampleattention(alpha=0.67, window_share=0.04)",
        "0.1": "sampleattention(alpha=0.46, window_share=0.02)", "0.15": "sampleattention(alpha=0.57, window_share=0.02)",
    },
    "pbs-attn": {
        "0.4": "pbs-attn(tau=0.92, block=32, segment=128, scores='antidiagonal', stride=4)",
        "0.2": "pbs-attn(tau=0.72, block=32, segment=128, scores='antidiagonal', stride=4)",
        "0.1": "pbs-attn(tau=0.4, block=32, segment=128, scores='antidiagonal', stride=4)",
        "0.15": "pbs-attn(tau=0.76, block=16, segment=64, scores='antidiagonal', stride=2)",
    },
    "anchorattention": {
        "0.4": "anchorattention(theta=10.0, block=64, step=4, tail=64)", "0.2": "anchorattention(theta=7.5, block=64, step=4, tail=64)",
        "0.1": "anchorattention(theta=3.0, block=64, step=2, tail=64)",
        "0.15": "anchorattention(theta=8.0, block=32, step=2, local=16, initial=4, tail=64)",
    },
    "proxyattn": {
        "0.4": "proxyattn(gamma=0.98, groups=2, stride=2, least=256, block=32)",
        "0.2": "proxyattn(gamma=0.91, groups=2, stride=2, least=128, block=32)",
        "0.1": "proxyattn(gamma=0.77, groups=2, stride=2, least=64, block=32)",
        "0.15": "proxyattn(gamma=0.84, groups=2, stride=1, least=256, block=32)",
    },
    "minference": {
        "0.4": "minference(columns=0.07, offsets=0.055)", "0.2": "minference(columns=0.04, offsets=0.035)",
        "0.1": "minference(columns=0.02, offsets=0.02, sinks=8, near=40)",
        "0.15": "minference(columns=0.015, offsets=0.008, sinks=8, near=40)",
    },
    "hyperattention": {
        "0.4": "hyperattention(min_length=512, block=256, samples=192)", "0.2": "hyperattention(min_length=256, block=64, samples=96)",
        "0.1": "hyperattention(min_length=128, block=32, samples=32)",
    },
    "gna": {"0.4": "gna(window={0.24}, stride=128)", "0.2": "gna(window={0.12}, stride=64)", "0.1": "gna(window={0.055}, stride=32)"},
    "sinklora": {"0.4": "sinklora(groups=3)", "0.2": "sinklora(groups=5)", "0.1": "sinklora(groups=10)"},
    "fna": {"0.4": "fna(window={0.2254})", "0.2": "fna(window={0.1056})", "0.1": "fna(window={0.0513})"},
    "swat": {
        aim: f"swat(window={{{share}}}, slopes='none', weights='softmax')" for aim, share in (("0.4", 0.2), ("0.2", 0.08), ("0.1", 0.033))
    },
    "s2-attention": {
        "0.4": "s2-attention(local={0.12/64}, stride=4, dense_every=0)", "0.2": "s2-attention(local={0.04/64}, stride=8, dense_every=0)",
        "0.1": "s2-attention(local={0.02/64}, stride=16, dense_every=0)",
    },
    "longlora": {"0.4": "longlora(groups=3)", "0.2": "longlora(groups=5)", "0.1": "longlora(groups=10)"},
    "longgen": {
        "0.4": "longgen(window={0.2/64}, dense='none')", "0.2": "longgen(window={0.09/64}, dense='none')",
        "0.1": "longgen(window={0.045/64}, dense='none')",
    },
    "powerattention": {
        "0.4": "powerattention(window={0.19/64}, block=64)", "0.2": "powerattention(window={0.03/64}, block=64)",
        "0.1": "powerattention(window={0.02/32}, block=32)",
    },
    "moa": {aim: f"moa(bound={aim}, block=32, alpha_step=128, alpha_max=4096)" for aim in ("0.4", "0.2", "0.1")},
}  # fmt: skip

# -- issue: the cache; aims are shares of the entries that are kept or read, or bits ---------------------------------------------

_SHARES = ("0.5", "0.25", "0.1", "0.05")


def _same(spec: str) -> dict[str, str]:
    """A spec with # where the share stands."""
    return {share: spec.replace("#", share) for share in _SHARES}


def _tokens(spec: str, **parts: float) -> dict[str, str]:
    """A spec with <name> where a multiple of the share stands, in the notation of holes without its braces."""
    found = {}
    for share in _SHARES:
        text = spec
        for name, factor in parts.items():
            text = text.replace(f"<{name}", f"{{{factor * float(share):.6g}").replace(">", "}")
        found[share] = text
    return found


CACHE: dict[str, dict[str, str]] = {
    # read less of a cache that stays
    "less-is-more": _same("less-is-more(budget=#, start=0, correction=4)"),
    "magicpig": {
        "0.5": "magicpig(bits=5, tables=60)", "0.25": "magicpig(bits=7, tables=100)", "0.1": "magicpig(bits=9, tables=120)",
        "0.05": "magicpig(bits=10, tables=150)",
    },
    "top-theta": _tokens("top-theta(k=<k>, first_k=<k>)", k=1.0),
    "loki": _same("loki(budget=#)"),
    "spatten": {
        "0.5": "spatten(token_ratios=(0.05, 0.2), recent=32)", "0.25": "spatten(token_ratios=(0.2, 0.35), recent=32)",
        "0.1": "spatten(token_ratios=(0.4, 0.5), recent=32)", "0.05": "spatten(token_ratios=(0.6, 0.6), recent=32)",
    },
    "ltri-llm": _tokens("ltri-llm(n_local=<half>, n_init=16, chunk=<some>, stretch=256, longest=24, budget=<half>)", half=0.5, some=0.25),
    "sparse-to-dense": _same("sparse-to-dense(budget=#)"),
    "quest": _same("quest(budget=#)"),
    "delta-layer-aware": _same("delta-layer-aware(budget=#)"),
    "hylra": _same("hylra(budget=#, block=64)"),
    "tokenselect": _tokens("tokenselect(sinks=16, local=<some>, budget=<most>)", some=0.25, most=0.75),
    "a2ats": _same("a2ats(budget=#)"),
    "squeezed-attention": _same("squeezed-attention(budget=#)"),
    "retrievalattention": _tokens("retrievalattention(sinks=16, window=<half>, top_k=<half>)", half=0.5),
    # chunks of 4 bytes, not of 8 tokens: the mean over more of them hides the one that a query looks for, digits of a number most of all.
    # A fifth of what a step reads is outliers. Rank 48 of the model's 128 channels: with the outliers a quarter of the bytes at 0.25
    "shadowkv": {
        share: f"shadowkv(rank=48, chunk=4, budget={0.8 * float(share):.6g}, outliers={{{0.1875 * float(share):.6g}/4}})"
        for share in _SHARES
    },
    "tidaldecode": _same("tidaldecode(budget=#, start=0, correction=4)"),
    "double-sparsity": _same("double-sparsity(channels=0.25, budget=#)"),
    "infllm": _tokens("infllm(n_local=<half>, n_init=16, chunk=<some>, block=32, blocks=<half/32>, cached=<half/32>)", half=0.5, some=0.25),
    # keep less of it
    "adore": _tokens("adore(size=<all>, rebuild=8, recent=<some>)", all=1.0, some=0.25),
    "caote": _same("caote(base='h2o(budget=#)')"),
    "caote-snapkv": _same("caote(base='snapkv(budget=#, window=64, kernel=31)')"),
    "razorattention": {
        "0.5": "razorattention(induction=0.25, local=64, divisor=3)", "0.25": "razorattention(induction=0.12, local=64, divisor=12)",
        "0.1": "razorattention(echo=0.0, induction=0.06, local=64, divisor=25)",
        "0.05": "razorattention(echo=0.0, induction=0.0, local=64, divisor=20)",
    },
    "l2-norm": {
        "0.5": "l2-norm(budget=0.33)", "0.25": "l2-norm(budget=0.14, skip_layers=(0,))", "0.1": "l2-norm(budget=0.1, skip_layers=())",
        "0.05": "l2-norm(budget=0.05, skip_layers=())",
    },
    "duoattention": {
        "0.5": "duoattention(share=0.43, sinks=16, recent={0.1})", "0.25": "duoattention(share=0.18, sinks=16, recent={0.06})",
        "0.1": "duoattention(share=0.06, sinks=16, recent={0.03})", "0.05": "duoattention(share=0.0, sinks=16, recent={0.03})",
    },
    "ems": _same("ems(budget=#)"),
    "look-m": _same("look-m(budget=#)"),
    "snapkv": _same("snapkv(budget=#, window=64, kernel=31)"),
    "kvmerger": {
        "0.5": "kvmerger(budget=0.2)", "0.25": "kvmerger(budget=0.14, skip_layers=(0,), heavy=0.05, recent=0.05)",
        "0.1": "kvmerger(budget=0.1, skip_layers=(), heavy=0.03, recent=0.03)",
        "0.05": "kvmerger(budget=0.05, skip_layers=(), heavy=0.015, recent=0.015)",
    },
    "attention-gate": {aim: f"attention-gate(threshold={tau})" for aim, tau in zip(_SHARES, (0.3, 0.5, 0.7, 0.9), strict=True)},
    "h2o": _same("h2o(budget=#)"),
    "gemfilter": _same("gemfilter(budget=#, kernel=41, recent=96, queries=32, weights='softmax')"),
    "d2o": {
        "0.5": "d2o(budget=0.2)", "0.25": "d2o(budget=0.14, skip_layers=(0,))", "0.1": "d2o(budget=0.1, skip_layers=())",
        "0.05": "d2o(budget=0.05, skip_layers=())",
    },
    "dynamic-llava": {"0.5": "dynamic-llava(instruction=0.5)"},
    "streaming-llm": _tokens("streaming-llm(sinks=4, window=<all>)", all=1.0),
    # store it in fewer bits or channels
    "akvq-vl": {
        "8 bits": "akvq-vl(text_bits=8, low_bits=8)", "4 bits": "akvq-vl(text_bits=4, low_bits=4)", "4/2 bits": "akvq-vl",
        "2 bits": "akvq-vl(text_bits=2, low_bits=2)",
    },
    "zipvl": {
        "4/2 bits": "zipvl", "4/4 bits": "zipvl(low_bits=4)", "4 bits, rest dropped": "zipvl(rest='drop')",
        "2/1 bits": "zipvl(high_bits=2, low_bits=1)",
    },
    "zipcache": {
        "8 bits": "zipcache(salient_bits=8, other_bits=8)", "4 bits": "zipcache(salient_bits=4, other_bits=4)", "4/2 bits": "zipcache",
        "2 bits": "zipcache(salient_bits=2, other_bits=2)",
    },
    "cskv": {share: f"cskv(key_density={share}, value_density={share})" for share in ("0.5", "0.25", "0.125")},
    "matryoshkakv": {share: f"matryoshkakv(budget={share})" for share in ("0.5", "0.25", "0.125")},
    "think": {
        "keys 0.6": "think", "0.5": "think(share=0.5, value_share=0.5)", "0.25": "think(share=0.75, value_share=0.75)",
        "0.1": "think(share=0.9, value_share=0.9)",
    },
    "kvquant": {f"{bits} bits": f"kvquant(bits={bits})" for bits in (8, 4, 3, 2)},
}  # fmt: skip

# fields that a plan depends on; for all other methods one plan serves every budget
PLAN_FIELDS: dict[str, tuple[str, ...]] = {
    "moa": ("bound",), "top-theta": ("k", "first_k"), "cskv": ("key_density", "value_density"), "kvquant": ("bits",),
}  # fmt: skip
# methods that run without a plan too, and are better with one
PLANNED = ("dhsa", "delta-layer-aware", "akvq-vl")


@dataclass(frozen=True)
class Entry:
    """One line of a table. system: the method; aim: its label (a share, or bits); template: its spec with holes."""

    system: str
    aim: str
    template: str

    def spec(self, length: int) -> str:
        """The spec for prompts of so many tokens."""
        return filled(self.template, length)


def filled(template: str, length: int) -> str:
    """A spec with the holes filled in; every number is at least 1."""

    def number(found: re.Match[str]) -> str:
        tokens, unit = float(found[1]) * length, int(found[3] or 1)
        return str(max(1, round(tokens / unit)) * (unit if found[2] == ":" else 1))

    return HOLE.sub(number, template)


def entries(table: Mapping[str, Mapping[str, str]], aims: Sequence[str] = (), systems: Sequence[str] = ()) -> list[Entry]:
    """The lines of a table, first aim first over all methods, so that a run cut short holds every method.

    aims, systems: keep these only; labels that are no number (bits) always stay. ValueError for one the table does not know.
    """
    every = {aim for specs in table.values() for aim in specs}
    for what, given, known in (("budgets", aims, every), ("methods", systems, set(table))):
        unknown = [one for one in given if one not in known]
        if unknown:
            raise ValueError(f"the table has no {what} {', '.join(unknown)}: choose among {', '.join(sorted(known))}")
    chosen = {system: specs for system, specs in table.items() if not systems or system in systems}
    lines = {
        system: [Entry(system, aim, spec) for aim, spec in specs.items() if not aims or aim in aims or not _number(aim)]
        for system, specs in chosen.items()
    }
    most = max(map(len, lines.values()), default=0)
    return [line[i] for i in range(most) for line in lines.values() if i < len(line)]


def _number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()
