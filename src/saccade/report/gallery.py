"""The gallery: for each method a picture of what it reads of the same attention maps, and a page that shows them all."""

from __future__ import annotations

import base64
from collections.abc import Sequence
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


def write_gallery(entries: Sequence[Entry], folder: str | Path, *, caption: str, command: str) -> Path:
    """One PNG a method and `index.md` in `folder`, which is made if it isn't there; returns the page's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        width, height, pixels = picture(entry)
        with atomic_write(folder / f"{entry.slug}.png") as temporary:
            temporary.write_bytes(png(width, height, pixels))
    with atomic_write(folder / "index.md") as temporary:
        temporary.write_text(page(entries, caption, command), encoding="utf-8")
    return folder / "index.md"


def picture(entry: Entry) -> tuple[int, int, bytes]:
    """(width, height, pixels): the entry's heads side by side, attention in ink, what is read in colour."""
    tiles = [_head(head, entry.spec) for head in entry.heads]
    height = max(size for size, _ in tiles)
    rows = []
    for y in range(height):
        line = bytearray()
        for i, (size, pixels) in enumerate(tiles):
            line += bytes([PAGE]) * (3 * GAP) if i else b""
            line += pixels[y * size * 3 : (y + 1) * size * 3] if y < size else bytes([PAGE]) * (3 * size)
        rows.append(bytes(line))
    return len(rows[0]) // 3, height, b"".join(rows)


def _head(head: dict[str, Any], spec: str) -> tuple[int, bytes]:
    n = int(head["size"])
    ink = base64.b64decode(head["map"])
    kept = base64.b64decode(head["selections"][spec])
    out = bytearray()
    for y in range(n):
        line = bytearray()
        for x in range(n):
            line += bytes(_colour(ink[y * n + x] / 255, kept[y * n + x] / 255, x <= y)) * SCALE
        out += bytes(line) * SCALE
    return n * SCALE, bytes(out)


def _colour(ink: float, kept: float, visible: bool) -> list[int]:
    """Attention that is read is dark, attention that is missed is grey; what is read without attention is pale blue."""
    if not visible:
        return [PAGE] * 3
    ground = [PAGE - (PAGE - c) * 0.35 * kept for c in KEPT]
    strength = ink * (0.35 + 0.65 * kept)
    return [round(g + (c - g) * strength) for g, c in zip(ground, INK, strict=True)]


def page(entries: Sequence[Entry], caption: str, command: str) -> str:
    """The page as Markdown, one section a family."""
    lines = ["# Gallery", "", caption, "", f"Made by `{command}`.", ""]
    for family in dict.fromkeys(entry.family for entry in entries):
        lines += [f"## {family}", ""]
        for entry in (entry for entry in entries if entry.family == family):
            name = f"[{entry.slug}]({entry.url})" if entry.url else entry.slug
            lines += [
                f"### {name}", "", entry.about, "", f"![what {entry.slug} reads]({entry.slug}.png)", "",
                f"`{entry.spec}`: {entry.density:.0%} of the visible pairs read, {entry.mass:.0%} of the attention covered.", "",
            ]  # fmt: skip
    return "\n".join(lines)
