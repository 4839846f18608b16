"""One look per method: a colour and a marker that stay the same in every chart, chip and table of a page.

Eight hues, each in a form for white paper and one for a dark screen, with a contrast of at least 3 to 1 against the
page and far apart as colour-blind readers see them (simulated; a test holds the distance). Markers run at another pace
than colours, so 64 methods have 64 different looks and none depends on hue alone. Dense is ink, random is grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

LIGHT = ("#1681dd", "#df7a18", "#0f6243", "#942789", "#76590b", "#8027ef", "#0b2195", "#5d1709")
DARK = ("#8faff8", "#c99236", "#46db95", "#cc33a3", "#dbd149", "#7e42f0", "#4473d9", "#b9664f")
MARKERS = ("circle", "square", "triangle-up", "cross", "hexagon", "triangle-down", "star", "triangle-right")

# The markers again as paths in a 16 x 16 box, for chips and tables, which are plain HTML.
PATHS = {
    "circle": "M8 2a6 6 0 1 0 .01 0z",
    "square": "M3 3h10v10H3z",
    "triangle-up": "M8 2l6.5 11.5h-13z",
    "triangle-down": "M8 14L1.5 2.5h13z",
    "triangle-right": "M14 8L2.5 14.5v-13z",
    "cross": "M6 2h4v4h4v4h-4v4H6v-4H2V6h4z",
    "hexagon": "M4.5 2h7L15 8l-3.5 6h-7L1 8z",
    "star": "M8 1l2 4.8 5.2.4-4 3.4 1.3 5.1L8 12l-4.5 2.7 1.3-5.1-4-3.4 5.2-.4z",
    "diamond": "M8 .5L15.5 8 8 15.5.5 8z",
    "x": "M4 1.5L8 5.5l4-4L14.5 4l-4 4 4 4-2.5 2.5-4-4-4 4L1.5 12l4-4-4-4z",
}

# The score scale, from dark blue to yellow: its lightness only rises, so it reads in grey and for every eye.
_SCALE = (
    (0.0, (0, 32, 77)),
    (0.25, (61, 78, 107)),
    (0.5, (125, 124, 120)),
    (0.75, (188, 174, 108)),
    (1.0, (255, 233, 69)),
)


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a method is drawn: a CSS class that carries its colour, and a marker."""

    css: str
    marker: str

    @property
    def path(self) -> str:
        return PATHS[self.marker]


def looks(slugs: Sequence[str]) -> list[Look]:
    """The look of each method, in order; `slugs` are the methods' slugs, which may repeat."""
    found: list[Look] = []
    others = 0
    for slug in slugs:
        if slug == "dense":
            found.append(Look(css="look-dense", marker="diamond"))
        elif slug == "random":
            found.append(Look(css="look-random", marker="x"))
        else:
            turn = others % (len(LIGHT) * len(MARKERS))
            marker = MARKERS[(turn + turn // len(LIGHT)) % len(MARKERS)]
            found.append(Look(css=f"look-{turn % len(LIGHT)}", marker=marker))
            others += 1
    return found


def shade(score: float) -> tuple[str, str]:
    """Background and text colour, as CSS, of a heat map's cell with this score in [0, 1]."""
    score = min(max(score, 0.0), 1.0)
    for (a, low), (b, high) in pairwise(_SCALE):
        if score <= b:
            at = (score - a) / (b - a)
            red, green, blue = (round(x + (y - x) * at) for x, y in zip(low, high, strict=True))
            break
    else:
        red, green, blue = _SCALE[-1][1]
    background = f"#{red:02x}{green:02x}{blue:02x}"
    text = max(("#ffffff", "#000000"), key=lambda ink: contrast(background, ink))
    return background, text


def contrast(a: str, b: str) -> float:
    """WCAG contrast ratio of two colours given as `#rrggbb`."""
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
