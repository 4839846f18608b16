"""PNG files without an image library: eight bits a channel, red green blue."""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG file of `height` rows of `width` pixels, three bytes each. Raises ValueError where `pixels` has another length."""
    line = 3 * width
    if width < 1 or height < 1 or len(pixels) != line * height:
        raise ValueError(f"{len(pixels)} bytes are no picture of {width} x {height} pixels: expected {line * height}")
    rows = b"".join(b"\x00" + pixels[y * line : (y + 1) * line] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return SIGNATURE + b"".join(_chunk(*part) for part in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
