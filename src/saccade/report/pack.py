"""Making the page small: plotly's script and the attention maps are deflated here, and inflated by the browser."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from saccade.report.result import finite

SCORES = ("sink", "retrieval")
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention viewer's data: `index` says where in `layers` (a deflated stream each, base64) every map begins."""

    index: dict[str, Any]
    layers: list[str]


def deflate(data: bytes) -> str:
    """A zlib stream in base64: what the page's `inflate` reads, through the browser's DecompressionStream."""
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


@lru_cache(maxsize=1)
def plotly_script() -> tuple[str, str]:
    """Plotly's script as `(deflated, version)`. Raises ImportError naming the extra where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs, get_plotlyjs_version
    except ImportError:
        raise ImportError("the report's charts need plotly: pip install 'saccade[report]'") from None
    return deflate(get_plotlyjs().encode()), get_plotlyjs_version()


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element, whatever the strings hold. Raises ValueError on NaN and infinities."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return "".join(_ESCAPES.get(character, character) for character in text)


def pack_attention(attention: dict[str, Any] | None, methods: list[str]) -> Attention | None:
    """Pool the maps of each layer into one stream, equal maps once (a group's heads often share a selection).

    `attention` is the result's part of that name: maps are base64 of `size * size` bytes. Methods keep the order of
    `methods`. Scores of heads and the texts of the tiles come along where the result has them.
    Raises ValueError on a map that is not base64 or not of its declared size.
    """
    if not attention or not attention.get("layers"):
        return None
    index: dict[str, Any] = {key: attention.get(key) for key in ("prompt", "length", "pool")}
    if attention.get("texts"):
        index["texts"] = attention["texts"]
    index["layers"] = []
    layers: list[str] = []
    named: set[str] = set()
    for layer in attention["layers"]:
        stream = bytearray()
        places: dict[bytes, int] = {}
        heads = []
        for head in layer["heads"]:
            where = f"layer {layer['layer']}, head {head['head']}"
            size = int(head["size"])
            selections = head.get("selections") or {}
            named.update(selections)
            heads.append(
                {
                    "head": head["head"],
                    "kv_head": head.get("kv_head"),
                    "size": size,
                    "map": _place(stream, places, head["map"], size, f"the attention map of {where}"),
                    "selections": {
                        method: _place(stream, places, text, size, f"the selection of {method} in {where}")
                        for method, text in selections.items()
                    },
                    "mass": finite(head.get("mass") or {}),
                    "density": finite(head.get("density") or {}),
                    **{score: finite(head[score]) for score in SCORES if score in head},
                }
            )
        index["layers"].append({"layer": layer["layer"], "heads": heads})
        layers.append(deflate(bytes(stream)))
    index["methods"] = [*(m for m in methods if m in named), *sorted(named.difference(methods))]
    return Attention(index=index, layers=layers)


def _place(stream: bytearray, places: dict[bytes, int], text: str, size: int, what: str) -> int:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise ValueError(f"{what} is not base64: the result file is damaged") from None
    if len(data) != size * size:
        raise ValueError(
            f"{what} holds {len(data)} bytes, expected {size} x {size} = {size * size}: the result file is damaged"
        )
    if data not in places:
        places[data] = len(stream)
        stream += data
    return places[data]
