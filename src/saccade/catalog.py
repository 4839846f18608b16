"""The catalogue: one row for every paper, done or planned, read from `catalog.toml`.

This module needs nothing but the standard library, so listings and error messages cost no import of torch.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

Status = Literal["planned", "done"]
Kind = Literal[
    "prefill", "decode", "cache", "mixer", "block", "quantizer", "adapter", "kernel", "system", "training", "probe",
    "task", "survey",
]

STATUSES: tuple[str, ...] = get_args(Status)
KINDS: tuple[str, ...] = get_args(Kind)
FAMILIES: tuple[str, ...] = (
    "adapt", "analysis", "cache", "decode", "diffusion", "exact", "heads", "hybrid", "kvcomp", "linear", "lowbit",
    "prefill", "score", "sparse", "static", "systems", "vision", "baseline",
)

_SLUG = re.compile(r"[a-z0-9][a-z0-9.-]*")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}")
_LONGEST_CLAIM = 160


@dataclass(frozen=True, kw_only=True)
class Row:
    """One entry.

    slug: the name used in spec strings. title: the paper's (for a baseline, what it is). arxiv: its id, or "".
    family: one of FAMILIES. kind: one of KINDS, what the entry is to this library. claim: what the paper shows, in one
    line, with its own number where it gives one. status: "done" when it runs here, else "planned". module: the dotted
    module that defines it, evidence: the pytest node id of the test that shows the claim; both may be "" while planned.
    """

    slug: str
    title: str
    arxiv: str
    family: str
    kind: str
    claim: str
    status: str
    module: str
    evidence: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str):
                raise ValueError(f"{field.name} of {self.slug!r} in the catalogue is {value!r}: write a string")
        if not _SLUG.fullmatch(self.slug):
            raise ValueError(f"{self.slug!r} is not a slug: use lower-case letters, digits, '-' and '.'")
        for name, allowed in (("family", FAMILIES), ("kind", KINDS), ("status", STATUSES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} of {self.slug!r} is unknown: use one of {', '.join(allowed)}"
                )
        if self.arxiv and not _ARXIV.fullmatch(self.arxiv):
            raise ValueError(f"arxiv {self.arxiv!r} of {self.slug!r} is not an id such as '2404.14469'")
        if not self.title or not self.claim or len(self.claim) > _LONGEST_CLAIM:
            raise ValueError(f"{self.slug!r} needs a title and a claim of 1 to {_LONGEST_CLAIM} characters")
        if self.status == "done" and not (self.module and "::" in self.evidence):
            raise ValueError(f"{self.slug!r} is marked done: name its module and its evidence (a pytest node id)")

    @property
    def url(self) -> str:
        """Where to read the paper, or "" for a baseline."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    @property
    def done(self) -> bool:
        return self.status == "done"


def read_rows(document: Mapping[str, Any]) -> dict[str, Row]:
    """Rows by slug, papers first, in the order of the document, a parsed `catalog.toml`.

    Raises ValueError, in one sentence, on an unknown table or key, a missing key, a wrong value or a repeated slug.
    """
    names = [field.name for field in fields(Row)]
    for table in document:
        if table not in ("paper", "baseline"):
            raise ValueError(f"the catalogue has a table {table!r}: only [[paper]] and [[baseline]] are known")
    rows: dict[str, Row] = {}
    for entry in [*document.get("paper", []), *document.get("baseline", [])]:
        slug = entry.get("slug", "(no slug)")
        missing = [name for name in names if name not in entry]
        unknown = [name for name in entry if name not in names]
        if missing or unknown:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has the unknown key {unknown[0]!r}"
            raise ValueError(f"the catalogue's row {slug!r} {wrong}: its keys are {', '.join(names)}")
        row = Row(**entry)
        if row.slug in rows:
            raise ValueError(f"the catalogue has {row.slug!r} twice: every slug stands once")
        rows[row.slug] = row
    return rows


@cache
def catalog() -> dict[str, Row]:
    """Every row by slug, papers first, in the order of the file."""
    return read_rows(tomllib.loads(files("saccade").joinpath("catalog.toml").read_text("utf-8")))


def nearest(slug: str, count: int = 3) -> list[str]:
    """The slugs most like this one, best first; empty when none is close."""
    known = list(catalog())
    wanted = slug.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted in known:
        return [wanted]
    close = difflib.get_close_matches(wanted, known, n=count, cutoff=0.5)
    # a fragment such as "snap" or "moba" is often meant as part of a longer name, which difflib rates low
    inside = [name for name in known if len(wanted) >= 3 and wanted in name and name not in close]
    return (close + inside)[:count]


def find(slug: str) -> Row:
    """The row of `slug`; ValueError with the nearest names when there is none."""
    row = catalog().get(slug)
    if row is None:
        near = nearest(slug)
        hint = f"did you mean {', '.join(near)}?" if near else "`saccade list` shows all names"
        raise ValueError(f"there is no method or paper called {slug!r}: {hint}")
    return row
