"""PNG files without an image library: red green blue, as a palette where colours are few."""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PALETTE = 256  # colours that a palette holds


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG file of `height` rows of `width` pixels, three bytes each. Raises ValueError where `pixels` has another length.

    With at most PALETTE colours a pixel is stored as a number in a list of them.
    """
    line = 3 * width
    if width < 1 or height < 1 or len(pixels) != line * height:
        raise ValueError(f"{len(pixels)} bytes are no picture of {width} x {height} pixels: expected {line * height}")
    places: dict[bytes, int] = {}
    numbers = [places.setdefault(pixels[at : at + 3], len(places)) for at in range(0, len(pixels), 3)]
    few = len(places) <= PALETTE
    data, line = (bytes(numbers), width) if few else (pixels, line)
    rows = b"".join(b"\x00" + data[y * line : (y + 1) * line] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 3 if few else 2, 0, 0, 0)
    palette = [(b"PLTE", b"".join(places))] if few else []
    return SIGNATURE + b"".join(
        _chunk(*part) for part in ((b"IHDR", header), *palette, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    )  # fmt: skip


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
