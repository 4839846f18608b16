"""The gallery: for each method a picture of what it reads of the same attention maps, and a page that shows them all."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.core.files import atomic_write
from saccade.report.png import png

SCALE = 2  # screen pixels of a map's pixel, in each direction
GAP = 8
PAGE = 255  # white
INK = (27, 31, 35)
KEPT = (0, 114, 178)
LEVELS = (24, 10)  # of attention and of what is read: few enough for a palette, which halves the files
PLAIN = "attention.png"  # the heads without a method
TITLES = {
    "prefill": "Sparse prefill", "score": "Cheap scores", "static": "Fixed patterns", "heads": "Patterns by head",
    "cache": "Eviction and merging", "decode": "Retrieval while decoding", "exact": "Exact attention", "lowbit": "Low bits",
    "sparse": "Trained sparse attention", "vision": "Images and video", "kvcomp": "Smaller entries", "baseline": "Random choice",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method's part. spec: as it ran. heads: the chosen heads of a result's "attention" part, with their layer.

    about: the paper's claim, one line. url: where to read it, or "".
    """

    slug: str
    spec: str
    family: str
    about: str
    url: str
    heads: list[dict[str, Any]]

    @property
    def density(self) -> float:
        return sum(head["density"][self.spec] for head in self.heads) / len(self.heads)

    @property
    def mass(self) -> float:
        return sum(head["mass"][self.spec] for head in self.heads) / len(self.heads)


def write_gallery(
    entries: Sequence[Entry], folder: str | Path, *, caption: str, command: str, absent: Mapping[str, str] | None = None
) -> Path:
    """One PNG a method, one of the heads alone, and `index.md` in `folder`, which is made if it isn't there; returns the page's path.

    Every entry shows the same heads. absent: methods without a picture, and why. ValueError when there is no entry.
    """
    if not entries:
        raise ValueError("no method could be drawn: name at least one that chooses keys")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {PLAIN: picture(entries[0].heads, None), **{f"{entry.slug}.png": picture(entry.heads, entry.spec) for entry in entries}}
    for name, drawn in pictures.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(png(*drawn))
    with atomic_write(folder / "index.md") as temporary:
        temporary.write_text(page(entries, caption, command, absent or {}), encoding="utf-8")
    return folder / "index.md"


def picture(heads: Sequence[dict[str, Any]], spec: str | None) -> tuple[int, int, bytes]:
    """(width, height, pixels): the heads side by side, attention in ink, what `spec` reads of it in colour; None: attention alone."""
    tiles = [_head(head, spec) for head in heads]
    height = max(size for size, _ in tiles)
    rows = []
    for y in range(height):
        line = bytearray()
        for i, (size, pixels) in enumerate(tiles):
            line += bytes([PAGE]) * (3 * GAP) if i else b""
            line += pixels[y * size * 3 : (y + 1) * size * 3] if y < size else bytes([PAGE]) * (3 * size)
        rows.append(bytes(line))
    return len(rows[0]) // 3, height, b"".join(rows)


def _head(head: dict[str, Any], spec: str | None) -> tuple[int, bytes]:
    n = int(head["size"])
    ink = base64.b64decode(head["map"])
    kept = None if spec is None else base64.b64decode(head["selections"][spec])
    out = bytearray()
    for y in range(n):
        line = bytearray()
        for x in range(n):
            strength = _level(ink[y * n + x], LEVELS[0])
            colour = _mixed([PAGE] * 3, strength) if kept is None else _colour(strength, _level(kept[y * n + x], LEVELS[1]))
            line += bytes(colour if x <= y else [PAGE] * 3) * SCALE
        out += bytes(line) * SCALE
    return n * SCALE, bytes(out)


def _level(byte: int, levels: int) -> float:
    """The nearest of so many levels from 0 to 1."""
    return round(byte / 255 * (levels - 1)) / (levels - 1)


def _colour(ink: float, kept: float) -> list[int]:
    """Attention that is read is dark, attention that is missed is grey; what is read without attention is pale blue."""
    return _mixed([PAGE - (PAGE - c) * 0.35 * kept for c in KEPT], ink * (0.35 + 0.65 * kept))


def _mixed(ground: Sequence[float], ink: float) -> list[int]:
    return [round(g + (c - g) * ink) for g, c in zip(ground, INK, strict=True)]


def page(entries: Sequence[Entry], caption: str, command: str, absent: Mapping[str, str]) -> str:
    """The page as Markdown, one section a family."""
    heads = ", ".join(f"layer {head['layer']} head {head['head']}" for head in entries[0].heads)
    lines = [
        "# Gallery", "", caption, "", f"Made by `{command}`.", "", "## The attention itself", "", f"![attention of the heads]({PLAIN})", "",
        f"From left to right: {heads}.", "",
    ]  # fmt: skip
    for family in dict.fromkeys(entry.family for entry in entries):
        lines += [f"## {TITLES.get(family, family)}", ""]
        for entry in (entry for entry in entries if entry.family == family):
            name = f"[{entry.slug}]({entry.url})" if entry.url else entry.slug
            lines += [
                f"### {name}", "", entry.about, "", f"![what {entry.slug} reads]({entry.slug}.png)", "",
                f"`{entry.spec}`: {entry.density:.0%} of the visible pairs read, {entry.mass:.0%} of the attention covered.", "",
            ]  # fmt: skip
    if absent:
        lines += ["## Not drawn", "", *(f"- {name}: {reason}." for name, reason in absent.items()), ""]
    return "\n".join(lines)
