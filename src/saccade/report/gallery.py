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
# of entries stored in another form
MORE, LESS = (200, 84, 0), (0, 114, 178)  # attention that a key gains, and that it loses
BITS, ERROR = (0, 104, 74), (150, 40, 110)
FULL_CHANGE = 0.15  # of a map's range from which on a change has its full colour: a factor of 4 in attention
ENCODED_LEVELS = (14, 4, 14)  # of attention, of its change in each direction, and of a token's bits and error
STRIP = 7  # screen pixels of a strip that has one value for each token
PLAIN = "attention.png"  # the heads without a method
TITLES = {
    "prefill": "Sparse prefill", "score": "Cheap scores", "static": "Fixed patterns", "heads": "Patterns by head",
    "cache": "Eviction and merging", "decode": "Retrieval while decoding", "exact": "Exact attention", "lowbit": "Low bits",
    "sparse": "Trained sparse attention", "vision": "Images and video", "kvcomp": "Smaller entries", "baseline": "Random choice",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method's part. spec: as it ran. heads: the chosen heads of a result's "attention" part, with their layer; of a method that stores
    entries in another form, those of `saccade.evaluate.gallery_encoded.encoded`, which have a map after that beside the one before.

    about: the paper's claim, one line. url: where to read it, or "". told: what was measured, where it is more than what the heads hold.
    """

    slug: str
    spec: str
    family: str
    about: str
    url: str
    heads: list[dict[str, Any]]
    told: str = ""

    @property
    def encoded(self) -> bool:
        return "decoded" in self.heads[0]

    @property
    def measured(self) -> str:
        """What stands below the picture, behind the spec."""
        return self.told or f"{self.density:.0%} of the visible pairs read, {self.mass:.0%} of the attention covered."

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
    pictures = {PLAIN: picture(entries[0].heads, None)}
    pictures |= {f"{entry.slug}.png": picture(entry.heads, None if entry.encoded else entry.spec, entry.encoded) for entry in entries}
    for name, drawn in pictures.items():
        data, path = png(*drawn), folder / name
        if path.is_file() and path.read_bytes() == data:
            continue
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
    with atomic_write(folder / "index.md") as temporary:
        temporary.write_text(page(entries, caption, command, absent or {}), encoding="utf-8")
    return folder / "index.md"


def picture(heads: Sequence[dict[str, Any]], spec: str | None, changes: bool = False) -> tuple[int, int, bytes]:
    """(width, height, pixels): the heads side by side, attention in ink, what `spec` reads of it in colour; None: attention alone.

    changes: the heads are those of entries stored in another form: what that changes, see `_changed_head`.
    """
    tiles = [_changed_head(head) if changes else _head(head, spec) for head in heads]
    widths = [int(head["size"]) * SCALE for head in heads]
    height = max(len(pixels) // (3 * width) for width, (_, pixels) in zip(widths, tiles, strict=True))
    rows = []
    for y in range(height):
        line = bytearray()
        for i, (width, (_, pixels)) in enumerate(zip(widths, tiles, strict=True)):
            line += bytes([PAGE]) * (3 * GAP) if i else b""
            line += (pixels[y * width * 3 : (y + 1) * width * 3]).ljust(3 * width, bytes([PAGE]))
        rows.append(bytes(line))
    return len(rows[0]) // 3, height, b"".join(rows)


def _changed_head(head: dict[str, Any]) -> tuple[int, bytes]:
    """Above, how many bits a number of each token's key and value has; the map, with the attention that a key gains or loses in colour;
    below, the error of each key and value."""
    n = int(head["size"])
    before, after = (base64.b64decode(head[name]) for name in ("map", "decoded"))
    levels, steps, _ = ENCODED_LEVELS

    def strips(name: str, colour: Sequence[int]) -> bytes:
        """Of keys and, below, of values."""
        return (bytes([PAGE]) * (3 * n * SCALE)).join(_strip(head[name][part], colour) for part in ("key", "value"))

    space = bytes([PAGE]) * (3 * n * SCALE * GAP)
    out = bytearray(strips("bits", BITS) + space)
    for y in range(n):
        line = bytearray()
        for x in range(n):
            old, new = before[y * n + x], after[y * n + x]
            change = (new - old) / 255 / FULL_CHANGE
            share = round(min(1.0, abs(change)) * steps) / steps
            ink = _mixed(INK, share, MORE if change > 0 else LESS)
            line += bytes(_mixed([PAGE] * 3, _level(max(old, new), levels), ink) if x <= y else [PAGE] * 3) * SCALE
        out += bytes(line) * SCALE
    return n * SCALE, bytes(out + space + strips("error", ERROR))


def _strip(values: str, colour: Sequence[int]) -> bytes:
    """A value for each pooled token, from white to a colour."""
    line = b"".join(bytes(_mixed([PAGE] * 3, _level(x, ENCODED_LEVELS[2]), colour)) * SCALE for x in base64.b64decode(values))
    return line * STRIP


def _head(head: dict[str, Any], spec: str | None) -> tuple[int, bytes]:
    n = int(head["size"])
    ink = base64.b64decode(head["map"])
    kept = None if spec is None else base64.b64decode(head["selections"][spec])
    out = bytearray()
    if "strip" in head:
        out += _strip(head["strip"], BITS) + bytes([PAGE]) * (3 * n * SCALE * GAP)
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


def _mixed(ground: Sequence[float], ink: float, colour: Sequence[int] = INK) -> list[int]:
    return [round(g + (c - g) * ink) for g, c in zip(ground, colour, strict=True)]


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
            shows = f"what {entry.slug} {'stores and changes' if entry.encoded else 'reads'}"
            lines += [f"### {name}", "", entry.about, "", f"![{shows}]({entry.slug}.png)", "", f"`{entry.spec}`: {entry.measured}", ""]
    if absent:
        lines += ["## Not drawn", "", *(f"- {name}: {reason}." for name, reason in absent.items()), ""]
    return "\n".join(lines)
