"""A search graph over keys that is made from the queries which look for them, and best-first search by inner product.

Queries lie elsewhere than keys, so keys that are near each other are not those that one query wants. The graph therefore comes from a
sample of queries:

    links         every query is linked to its `links` keys of highest inner product, found exactly
    projection    keys that share a query are linked: the query's best key with each of the others, both ways; of more than 2 `degree`
                  those that share most queries. A key's edges are pruned to `degree`: nearest first, without those that lie nearer to
                  an edge kept before than to the key itself, then filled up with what was left out
    connectivity  every key is linked with its degree / 2 nearest keys, both ways, pruned likewise; what can't be reached from the entry
                  yet gets an edge from its nearest reachable key

Source: retrievalattention, arXiv 2409.10516, section 3.2, after RoarGraph (2408.08933); the pruning's distance (Euclidean, between keys)
and the numbers of candidates are chosen here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.parts.pick import pick_best

PIECE = 1 << 24  # scores or channels held at a time
EXPANDED = 4  # keys whose edges are followed at a time


class KeyGraph(NamedTuple):
    """neighbours int32 `(..., n, W)`, past the end of a list n; entry int64 `(...)`: where a search begins."""

    neighbours: Tensor
    entry: Tensor


class Found(NamedTuple):
    """ids int64 `(B, Hq, k)` ascending; scanned int64 `(B, Hq)`: keys whose inner product was computed."""

    ids: Tensor
    scanned: Tensor


def key_graph(keys: Tensor, queries: Tensor, *, degree: int, links: int) -> KeyGraph:
    """The graph of one head's keys `(n, D)` for queries `(M, D)`; without queries (M = 0) it is one of near keys alone."""
    exact = torch.promote_types(keys.dtype, torch.float32)
    keys, queries = keys.to(exact), queries.to(exact)
    n = keys.shape[0]
    near = _near_keys(keys, max(1, degree // 2))
    source, target = _both_ways(torch.arange(n, device=keys.device).unsqueeze(-1), near)
    graph = [_prune(keys, _listed(source, target, n, degree), degree // 2)]
    if queries.shape[0]:
        found = torch.cat([(part @ keys.mT).topk(min(links, n), dim=-1).indices for part in queries.split(max(1, PIECE // n))])
        source, target = _both_ways(found[:, :1], found[:, 1:])
        graph.insert(0, _prune(keys, _listed(source, target, n, 2 * degree), degree))
        entry = (keys @ queries.mean(0)).argmax()
    else:
        entry = keys.square().sum(-1).argmax()
    neighbours = torch.cat(graph, dim=-1)
    return KeyGraph(_reachable(keys, neighbours, entry).to(torch.int32), entry)


def stack_graphs(graphs: list[KeyGraph], lead: tuple[int, ...]) -> KeyGraph:
    """Graphs over equally many keys as one with `lead` axes in front."""
    width = max(graph.neighbours.shape[-1] for graph in graphs)
    n = graphs[0].neighbours.shape[0]
    padded = [torch.nn.functional.pad(graph.neighbours, (0, width - graph.neighbours.shape[-1]), value=n) for graph in graphs]
    return KeyGraph(torch.stack(padded).unflatten(0, lead), torch.stack([graph.entry for graph in graphs]).view(lead))


def search(q: Tensor, keys: Tensor, graph: KeyGraph, *, best: int, beam: int) -> Found:
    """The `best` keys of highest inner product with q `(B, Hq, D)` among keys `(B, Hk, n, D)` that a best-first search finds.

    Each query head searches the graph `(B, Hk, n, W)` of its key head. The pool holds the max(beam, best) best keys met so far; the edges
    of its best keys are followed until it holds none whose edges were not. A graph of fewer than `best` keys is an error of the caller.
    """
    batch, heads, _ = q.shape
    kv_heads, n = keys.shape[1], keys.shape[2]
    lanes, pool = batch * heads, min(max(beam, best), n)
    exact = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(exact).flatten(0, 1).unsqueeze(-1)
    base = torch.arange(batch * kv_heads, device=q.device).repeat_interleave(heads // kv_heads) * n
    flat, edges = keys.flatten(0, 2), graph.neighbours.flatten(0, 2)
    visited = torch.zeros(lanes, n + 1, dtype=torch.bool, device=q.device)
    ids = torch.full((lanes, pool), n, device=q.device)
    scores = torch.full((lanes, pool), -torch.inf, dtype=exact, device=q.device)
    open_ = torch.zeros(lanes, pool, dtype=torch.bool, device=q.device)
    fresh = graph.entry.flatten().repeat_interleave(heads // kv_heads).unsqueeze(-1)
    while True:
        visited.scatter_(1, fresh, True)
        places = base.unsqueeze(-1) + fresh.clamp(max=n - 1)
        found = (flat[places].to(exact) @ queries).squeeze(-1).masked_fill(fresh == n, -torch.inf)
        scores, order = torch.cat([scores, found], dim=-1).topk(pool, dim=-1)
        ids = torch.cat([ids, fresh], dim=-1).gather(-1, order)
        open_ = torch.cat([open_, fresh < n], dim=-1).gather(-1, order)
        ranked, slots = scores.masked_fill(~open_, -torch.inf).topk(min(EXPANDED, pool), dim=-1)
        if not bool((ranked > -torch.inf).any()):
            break
        open_ = open_.scatter(-1, slots, False)
        chosen = ids.gather(-1, slots)
        next_ids = edges[base.unsqueeze(-1) + chosen.clamp(max=n - 1)].long()
        next_ids = next_ids.masked_fill((ranked == -torch.inf).unsqueeze(-1), n).flatten(1)
        next_ids = next_ids.masked_fill(visited.gather(-1, next_ids), n).sort(-1).values
        # the same key may hang on several edges
        fresh = next_ids.masked_fill(torch.nn.functional.pad(next_ids[:, 1:] == next_ids[:, :-1], (1, 0)), n)
    visited[:, n] = False
    picked = ids.gather(-1, pick_best(scores, min(best, n))).sort(-1).values
    return Found(picked.view(batch, heads, -1), visited.sum(-1).view(batch, heads))


def _near_keys(keys: Tensor, count: int) -> Tensor:
    """Each key's `count` nearest other keys, `(n, count)` int64 (fewer where there are fewer)."""
    n = keys.shape[0]
    half, rows = keys.square().sum(-1) / 2, torch.arange(n, device=keys.device)
    found = []
    for part in rows.split(max(1, PIECE // n)):
        closeness = keys[part] @ keys.mT - half
        closeness[torch.arange(len(part), device=keys.device), part] = -torch.inf
        found.append(closeness.topk(min(count, n - 1), dim=-1).indices)
    return torch.cat(found)


def _both_ways(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    source, target = source.expand_as(target).flatten(), target.flatten()
    return torch.cat([source, target]), torch.cat([target, source])


def _listed(source: Tensor, target: Tensor, n: int, most: int) -> Tensor:
    """Edges as lists `(n, at most most)`, those that occur most often first, past the end n."""
    edges, counts = (source * n + target).unique(return_counts=True)
    order = torch.sort(counts, descending=True, stable=True).indices
    order = order[torch.sort(edges[order] // n, stable=True).indices]
    source, target = edges[order] // n, edges[order] % n
    sizes = torch.bincount(source, minlength=n)
    place = torch.arange(len(source), device=source.device) - (sizes.cumsum(0) - sizes)[source]
    lists = torch.full((n, min(most, int(sizes.max())) if len(source) else 0), n, device=source.device)
    kept = place < lists.shape[1]
    lists[source[kept], place[kept]] = target[kept]
    return lists


def _prune(keys: Tensor, lists: Tensor, degree: int) -> Tensor:
    """At most `degree` of each key's edges: spread out ones first, nearest first."""
    n, width = lists.shape
    if not width:
        return lists
    pieces = []
    for rows in torch.arange(n, device=keys.device).split(max(1, PIECE // (width * max(width, keys.shape[1])))):
        ids = lists[rows]
        there = ids < n
        ends = keys[ids.clamp(max=n - 1)]
        away = (ends - keys[rows].unsqueeze(1)).square().sum(-1).masked_fill(~there, torch.inf)
        away, order = torch.sort(away, dim=-1, stable=True)
        ids, ends = ids.gather(-1, order), ends.gather(1, order.unsqueeze(-1).expand_as(ends))
        between = torch.cdist(ends, ends).square()
        kept = torch.zeros_like(there)
        for i in range(width):
            nearer = (kept & (between[:, :, i] < away[:, i : i + 1])).any(-1)
            kept[:, i] = (away[:, i] < torch.inf) & ~nearer
        # kept edges first, then the others by distance; absent ones stand at the end anyway
        order = torch.sort((~kept).to(torch.uint8), dim=-1, stable=True).indices
        pieces.append(ids.gather(-1, order)[:, :degree])
    return torch.cat(pieces)


def _reachable(keys: Tensor, neighbours: Tensor, entry: Tensor) -> Tensor:
    """The lists with edges added until every key can be reached from the entry."""
    n = keys.shape[0]
    reached = torch.zeros(n + 1, dtype=torch.bool, device=keys.device)
    edge = entry.view(1)
    while edge.numel():
        reached[edge] = True
        ahead = neighbours[edge].flatten().unique()
        edge = ahead[(ahead < n) & ~reached[ahead]]
    lost = (~reached[:n]).nonzero().flatten()
    if not lost.numel():
        return neighbours
    known = reached[:n].nonzero().flatten()
    half = keys[known].square().sum(-1) / 2
    near = torch.cat([(keys[part] @ keys[known].mT - half).argmax(-1) for part in lost.split(max(1, PIECE // n))])
    more = _listed(known[near], lost, n, n)
    return torch.cat([neighbours, more], dim=-1)
