"""Layers that a method leaves alone, named from the front or from the end."""

from __future__ import annotations


def check_layers(slug: str, given: object) -> tuple[int, ...]:
    """ValueError unless `given` is a tuple or list of whole numbers; -1 is the last layer. Returns the tuple."""
    if not isinstance(given, tuple | list) or not all(type(layer) is int for layer in given):
        raise ValueError(f"{slug}(skip_layers={given!r}) is not a tuple of layer numbers such as (0, 1, -1)")
    return tuple(given)


def acting_layers(skip: tuple[int, ...], layers: int) -> list[int]:
    """Numbers of the `layers` layers that are not among `skip`, ascending. A number beyond the model's layers names none."""
    return [layer for layer in range(layers) if layer not in skip and layer - layers not in skip]
