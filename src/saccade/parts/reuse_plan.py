"""Which layers read everything and which read again what an earlier layer chose: the cheapest safe assignment, exactly."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor


def cheapest_reuse(similarity: Tensor, theta: float, forced: Collection[int] = ()) -> list[int]:
    """For each of L layers the layer whose choice it reads; its own number where it reads everything.

    similarity: `(L, L)`, how much of layer j's own choice is in that of layer i < j, at [i, j]. Layer 0 and the layers in `forced` read
    everything. Layer j may follow i where similarity[i, j] >= theta and no layer in between reads everything: the last choice is the one
    that is valid. Of all such assignments the one with the fewest layers that read everything, then with the highest sum of similarities.

    Source: hylra, arXiv 2602.00777, section 3.3.
    """
    values: list[list[float]] = similarity.double().tolist()
    # best[i]: (layers that read everything, minus similarity, the sources so far) with layer i's choice valid
    best: dict[int, tuple[int, float, list[int]]] = {0: (1, 0.0, [0])} if values else {}
    for layer in range(1, len(values)):
        count, cost, sources = min(best.values(), key=lambda state: state[:2])
        follow = {
            i: (n, c - values[i][layer], [*taken, i])
            for i, (n, c, taken) in best.items() if layer not in forced and values[i][layer] >= theta
        }  # fmt: skip
        best = {**follow, layer: (count + 1, cost, [*sources, layer])}
    return min(best.values(), key=lambda state: state[:2])[2] if best else []
