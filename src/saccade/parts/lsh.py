"""Angular hashing: vectors that point the same way fall into the same bucket.

`angular_buckets`: one table whose neighbouring buckets differ in one bit. `sign_codes` and `HashTables`: many tables, in which the number
of collisions tells how close two directions are.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from saccade.parts.growing import Growing


def gray_rank(codes: Tensor, bits: int) -> Tensor:
    """The place of each code, integers below `2^bits`, in the Gray sequence, in which neighbours differ in one bit; same shape."""
    rank, shift = codes, 1
    while shift < bits:
        rank = rank ^ (rank >> shift)
        shift *= 2
    return rank


def angular_buckets(x: Tensor, directions: Tensor) -> Tensor:
    """Bucket of each vector of x `(B, H, N, D)` by the signs of its products with directions `(..., D, r)`: int64 `(B, H, N)` below 2^r.

    directions broadcasts over B and H. Two vectors at the angle a share a bit with probability 1 - a / pi (hyperattention, section 2).
    """
    bits = directions.shape[-1]
    signs = (x.to(directions.dtype) @ directions) > 0
    codes = (signs.long() << torch.arange(bits, device=x.device)).sum(-1)
    return gray_rank(codes, bits)


def hyperplanes(heads: int, dim: int, tables: int, bits: int, generator: torch.Generator) -> Tensor:
    """Gaussian directions `(heads, dim, tables, bits)` float32, drawn on the CPU."""
    return torch.randn(heads, dim, tables, bits, generator=generator)


def sign_codes(x: Tensor, planes: Tensor) -> Tensor:
    """Codes of x `(B, H, n, D)` in every table: the signs of its products with planes `(H, D, L, K)`, K <= 15, as bits.

    int16 `(B, H, n, L)`. Two vectors at the angle a have the same code in a table with probability `(1 - a / pi)^K`.
    """
    tables, bits = planes.shape[-2:]
    flat = planes.flatten(-2).to(x.device, torch.promote_types(x.dtype, torch.float32))
    powers = (1 << torch.arange(bits, device=x.device)).to(flat.dtype)
    # powers of 2 add up exactly in floating point; a few rows at a time bound the products
    pieces = [((piece.to(flat.dtype) @ flat) > 0).unflatten(-1, (tables, bits)) for piece in x.split(512, dim=2)]
    return torch.cat([(piece.to(flat.dtype) @ powers).to(torch.int16) for piece in pieces], dim=2)


def collision_rate(cosine: Tensor, bits: int, tables: int) -> Tensor:
    """The probability that two vectors with this cosine share their code in at least 2 of the tables, float64, like cosine.

    `u = 1 - (1 - a)^L - L a (1 - a)^(L - 1)` with `a = (1 - angle / pi)^K` (magicpig, section 4).
    """
    angle = cosine.to(torch.float64).clamp(-1, 1).arccos()
    a = (1 - angle / math.pi) ** bits
    return 1 - (1 - a) ** tables - tables * a * (1 - a) ** (tables - 1)


class HashTables:
    """Keys sorted by their code in each of L tables: a query's bucket is read, the other keys are not touched.

    order: int32 `(B, H, L, n)`, keys of a table by code. edges: int32 `(B, H, L, 2^K + 1)`: where each bucket begins.
    """

    def __init__(self, codes: Tensor, bits: int) -> None:
        """codes: int16 `(B, H, n, L)`, each below 2^bits."""
        by_table = codes.transpose(2, 3).contiguous()
        ordered, order = torch.sort(by_table, dim=-1, stable=True)
        values = torch.arange((1 << bits) + 1, device=codes.device).expand(*by_table.shape[:3], -1).contiguous()
        self.order, self.edges = order.to(torch.int32), torch.searchsorted(ordered.long(), values, out_int32=True)

    @property
    def n(self) -> int:
        return self.order.shape[-1]

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in (self.order, self.edges))

    def reorder(self, rows: Tensor) -> HashTables:
        """A copy with these batch rows."""
        new = copy.copy(self)
        new.order, new.edges = (x.index_select(0, rows.to(x.device)) for x in (self.order, self.edges))
        return new

    def collisions(self, codes: Tensor) -> Tensor:
        """In how many tables each key has the query's code: codes `(B, Hq, L)` of the queries to int64 `(B, Hq, n)`."""
        batch, heads, tables, n = self.order.shape
        group, rows = codes.shape[1] // heads, batch * codes.shape[1]
        bucket = codes.long().unflatten(1, (heads, group)).unsqueeze(-1)
        edges = self.edges.unsqueeze(2).expand(-1, -1, group, -1, -1)
        begin, end = (edges.gather(-1, bucket + i).flatten().long() for i in (0, 1))
        lengths = end - begin
        # the entries of all buckets in a row: of which (query head, table), and where in its order
        owner = torch.repeat_interleave(lengths)
        within = torch.arange(owner.shape[0], device=codes.device) - (lengths.cumsum(0) - lengths)[owner]
        head, table = owner // (group * tables), owner % tables
        keys = self.order.flatten()[(head * tables + table) * n + begin[owner] + within]
        return torch.bincount(owner // tables * n + keys, minlength=rows * n).view(batch, -1, n)


class CollisionIndex:
    """Keys of a cache hashed around their mean, which grows by whole prompts: each batch of keys has hash tables of its own.

    planes `(H, D, L, K)`; mean `(B, H, 1, D)` float32 or float64: taken off every key, so that keys do not crowd in one cone.
    """

    def __init__(self, planes: Tensor, mean: Tensor) -> None:
        self.planes, self.mean = planes.to(mean.device), mean
        self._tables: list[HashTables] = []
        self._norms = Growing(mean[:, :, :0, 0])

    @property
    def n(self) -> int:
        return self._norms.n

    @property
    def nbytes(self) -> int:
        own = self.planes.untyped_storage().nbytes() + self.mean.untyped_storage().nbytes() + self._norms.nbytes
        return own + sum(tables.nbytes for tables in self._tables)

    def append(self, keys: Tensor) -> None:
        """Hash keys `(B, H, m, D)` that follow those so far."""
        codes, norms = [], []
        for piece in keys.split(4096, dim=2):
            centred = piece.to(self.mean.dtype) - self.mean
            codes.append(sign_codes(centred, self.planes))
            norms.append(centred.norm(dim=-1))
        self._tables.append(HashTables(torch.cat(codes, dim=2), self.planes.shape[-1]))
        self._norms.append(torch.cat(norms, dim=2))

    def collisions(self, q: Tensor) -> Tensor:
        """In how many tables each key has the code of q `(B, Hq, D)`, which is not centred: int64 `(B, Hq, n)`."""
        group = q.shape[1] // self.planes.shape[0]
        codes = sign_codes(q.to(self.mean.dtype).unflatten(1, (-1, group)), self.planes).flatten(1, 2)
        return torch.cat([tables.collisions(codes) for tables in self._tables], dim=-1)

    def cosines(self, q: Tensor, dots: Tensor, places: Tensor) -> Tensor:
        """Cosines of q `(B, Hq, D)` with the centred keys at `places (B, Hq, m)`, whose products with q, not centred, are `dots`."""
        heads = self.planes.shape[0]
        wide = torch.promote_types(dots.dtype, self.mean.dtype)
        q = q.to(wide).unflatten(1, (heads, -1))
        off = (q @ self.mean.to(wide).mT).flatten(1, 2)
        listed = places.reshape(places.shape[0], heads, places.shape[1] // heads * places.shape[2])
        norms = self._norms.view.to(wide).gather(-1, listed).view(places.shape)
        lengths = norms * q.norm(dim=-1).flatten(1, 2).unsqueeze(-1)
        # a key at the mean has no direction: it counts as orthogonal
        return torch.where(lengths > 0, (dots - off) / lengths, 0.0)

    def reorder(self, rows: Tensor) -> CollisionIndex:
        """A copy with these batch rows."""
        new = copy.copy(self)
        new.mean = self.mean.index_select(0, rows.to(self.mean.device))
        new._tables = [tables.reorder(rows) for tables in self._tables]
        new._norms = self._norms.reorder(rows)
        return new
