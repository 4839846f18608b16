"""The gallery: pictures as PNG files, heads by what they show, a page that names every number."""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path

import pytest

from saccade.report.gallery import GAP, INK, LESS, MORE, PAGE, SCALE, STRIP, Entry, picture, write_gallery
from saccade.report.png import png


def head(size: int, ink: list[int], kept: list[int]) -> dict[str, object]:
    return {
        "head": 0, "layer": 0, "size": size, "map": base64.b64encode(bytes(ink)).decode(),
        "selections": {"quest": base64.b64encode(bytes(kept)).decode()}, "mass": {"quest": 0.75}, "density": {"quest": 0.5},
    }  # fmt: skip


def entry(*heads: dict[str, object]) -> Entry:
    about, url = "Pages by bound.", "https://arxiv.org/abs/2406.10774"
    return Entry(slug="quest", spec="quest", family="decode", about=about, url=url, heads=list(heads))


def decode(data: bytes) -> tuple[int, int, bytes]:
    """Width, height and pixels of a PNG whose rows are not filtered; checks the sums of its chunks."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        parts[kind] = body
        at += 12 + length
    width, height, depth, kind = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    assert depth == 8 and (kind == 3) == (b"PLTE" in parts)
    raw, line = zlib.decompress(parts[b"IDAT"]), width if kind == 3 else 3 * width
    rows = [raw[y * (line + 1) : (y + 1) * (line + 1)] for y in range(height)]
    assert all(row[0] == 0 for row in rows)
    pixels = b"".join(row[1:] for row in rows)
    return width, height, b"".join(parts[b"PLTE"][3 * i : 3 * i + 3] for i in pixels) if kind == 3 else pixels


def test_png_holds_its_pixels() -> None:
    pixels = bytes(range(2 * 3 * 3))
    assert decode(png(2, 3, pixels)) == (2, 3, pixels)
    many = bytes(x for i in range(20 * 20) for x in (i % 256, i // 256, 7))
    few = bytes(x for i in range(20 * 20) for x in (i % 256, 0, 7))
    assert decode(png(20, 20, many)) == (20, 20, many) and decode(png(20, 20, few)) == (20, 20, few)
    assert b"PLTE" in png(20, 20, few) and b"PLTE" not in png(20, 20, many)
    with pytest.raises(ValueError, match="no picture of 2 x 2"):
        png(2, 2, pixels)


def test_colours_say_what_is_read_and_what_is_missed() -> None:
    # first column: attention that is read, attention that is missed; then read without attention
    width, height, pixels = picture([head(2, [255, 0, 255, 0], [255, 0, 0, 255])], "quest")
    assert (width, height) == (2 * SCALE, 2 * SCALE)

    def at(x: int, y: int) -> tuple[int, ...]:
        place = 3 * (y * SCALE * width + x * SCALE)
        return tuple(pixels[place : place + 3])

    assert at(0, 0) == INK and at(1, 0) == (PAGE,) * 3
    missed, idle = at(0, 1), at(1, 1)
    assert max(missed) - min(missed) < 12 and sum(INK) < sum(missed) < 3 * PAGE  # grey, lighter than what is read
    assert idle[2] > idle[0] + 40  # blue

    plain = picture([head(2, [255, 0, 255, 0], [255, 0, 0, 255])], None)[2]
    assert tuple(plain[:3]) == INK and plain.count(bytes(INK)) >= 2 * SCALE, "without a method all attention is dark"
    assert tuple(plain[-3:]) == (PAGE,) * 3


def test_heads_stand_side_by_side() -> None:
    one = head(2, [0] * 4, [0] * 4)
    width, height, _ = picture([one, one, one], "quest")
    assert (width, height) == (3 * 2 * SCALE + 2 * GAP, 2 * SCALE)


def test_the_page_names_its_numbers_and_its_command(tmp_path: Path) -> None:
    words = {"caption": "Four heads.", "command": "saccade gallery"}
    path = write_gallery([entry(head(1, [9], [9]))], tmp_path / "out", **words, absent={"moa": "no plan"})
    page = path.read_text(encoding="utf-8")
    named = ("## Retrieval while decoding", "[quest](https://arxiv.org/abs/2406.10774)", "quest.png", "50% of the visible")
    for part in (*named, "75% of the attention", "From left to right: layer 0 head 0.", "(attention.png)", "- moa: no plan."):
        assert part in page
    assert "`saccade gallery`" in page
    for name in ("quest.png", "attention.png"):
        assert decode((path.parent / name).read_bytes())[:2] == (SCALE, SCALE)
    with pytest.raises(ValueError, match="no method could be drawn"):
        write_gallery([], tmp_path / "none", caption="", command="")
    assert not (tmp_path / "none").exists()


def changed(before: list[int], after: list[int], error: int = 0) -> dict[str, object]:
    packed = {name: base64.b64encode(bytes(x)).decode() for name, x in (("map", before), ("decoded", after))}
    strips = {
        name: {part: base64.b64encode(bytes([x, x])).decode() for part in ("key", "value")} for name, x in (("bits", 255), ("error", error))
    }
    return {"head": 0, "layer": 0, "size": 2, **packed, **strips}


def test_changed_attention_is_coloured_and_the_same_is_not() -> None:
    same = changed([255, 0, 90, 180], [255, 0, 90, 180])
    width, height, pixels = picture([same, changed([255, 0, 0, 255], [255, 0, 255, 0], error=255)], None, changes=True)
    strips = 2 * STRIP + 1
    assert (width, height) == (2 * 2 * SCALE + GAP, 2 * SCALE + 2 * (strips + GAP))

    def at(x: int, y: int) -> tuple[int, ...]:
        place = 3 * (y * width + x)
        return tuple(pixels[place : place + 3])

    top = strips + GAP
    for x, y in ((0, 0), (0, 1), (1, 1)):
        ink = at(x * SCALE, top + y * SCALE)
        assert max(ink) - min(ink) <= 8, "attention that stays is grey"
    other = 2 * SCALE + GAP
    assert at(other, top + SCALE) == MORE and at(other + SCALE, top + SCALE) == LESS and at(other, top) == INK
    assert at(0, 0)[1] > max(at(0, 0)[0], at(0, 0)[2]), "green: stored in full"
    assert at(0, height - 1) == (PAGE,) * 3 != at(other, height - 1), "errors stand below"


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    told = "30% of the bytes."
    one = Entry(slug="zipcache", spec="zipcache", family="kvcomp", about="Bits.", url="", heads=[changed([9] * 4, [9] * 4)], told=told)
    path = write_gallery([entry(head(2, [9] * 4, [9] * 4)), one], tmp_path, caption="", command="")
    page = path.read_text(encoding="utf-8")
    assert f"`zipcache`: {told}" in page and "## Smaller entries" in page and "what zipcache stores and changes" in page
    assert (tmp_path / "zipcache.png").stat().st_size


def test_a_picture_that_is_the_same_is_not_written_again(tmp_path: Path) -> None:
    one = entry(head(1, [9], [9]))
    write_gallery([one], tmp_path, caption="", command="")
    before = (tmp_path / "quest.png").stat().st_mtime_ns, (tmp_path / "quest.png").stat().st_ino
    write_gallery([one], tmp_path, caption="again", command="")
    assert ((tmp_path / "quest.png").stat().st_mtime_ns, (tmp_path / "quest.png").stat().st_ino) == before
    assert "again" in (tmp_path / "index.md").read_text(encoding="utf-8")
