"""Colours: readable on the page, apart for colour-blind readers, never reused with the same marker."""

from __future__ import annotations

from itertools import combinations

import pytest

from saccade.report.palette import DARK, LIGHT, MARKERS, PATHS, contrast, looks, shade

# How red, green and blue arrive with a missing cone (linear light; Machado, Oliveira and Fernandes 2009, severity 1).
BLIND = {
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
}


def lab(colour, matrix):
    linear = [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
    r, g, b = (min(max(sum(w * c for w, c in zip(line, linear, strict=True)), 0.0), 1.0) for line in matrix)
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


@pytest.mark.parametrize(("colours", "page"), [(LIGHT, "#ffffff"), (DARK, "#1b2025")])
def test_marks_stand_out_from_the_page(colours, page):
    assert min(contrast(colour, page) for colour in colours) >= 3.0


@pytest.mark.parametrize("colours", [LIGHT, DARK])
@pytest.mark.parametrize("kind", BLIND)
def test_colours_stay_apart_for_colour_blind_readers(colours, kind):
    seen = [lab(colour, BLIND[kind]) for colour in colours]
    nearest = min(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 for a, b in combinations(seen, 2))
    assert nearest > 15.0  # CIE76: from 2.3 on two large patches can be told apart, small marks need more


def test_64_methods_have_64_looks():
    found = looks([f"method-{i}" for i in range(64)])
    assert len({(look.css, look.marker) for look in found}) == 64
    assert {look.marker for look in found} == set(MARKERS)
    assert len({look.css for look in found[:8]}) == len({look.marker for look in found[:8]}) == 8


def test_dense_and_random_take_no_turn():
    dense, first, floor, second = looks(["dense", "snapkv", "random", "quest"])
    assert (dense.css, floor.css) == ("look-dense", "look-random")
    assert [first, second] == looks(["snapkv", "quest"])
    assert all(look.path == PATHS[look.marker] for look in (dense, first, floor, second))


def test_heat_rises_in_lightness_and_its_numbers_stay_readable():
    pairs = [shade(i / 50) for i in range(51)]
    against_black = [contrast(background, "#000000") for background, _ in pairs]
    assert against_black == sorted(against_black)
    assert min(contrast(background, ink) for background, ink in pairs) >= 4.5
    assert shade(-1.0) == shade(0.0) and shade(2.0) == shade(1.0)
