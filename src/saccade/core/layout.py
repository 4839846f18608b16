"""Which query head reads which key/value head."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """Head counts and dims of one attention layer.

    kv_of: for each query head the key/value head it reads; equal consecutive groups when not given.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    kv_of: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.kv_of:
            if self.kv_heads < 1 or self.query_heads % self.kv_heads:
                raise ValueError(
                    f"{self.query_heads} query heads cannot share {self.kv_heads} key/value heads equally: "
                    "make the first a multiple of the second, or pass kv_of"
                )
            object.__setattr__(self, "kv_of", tuple(h // self.group for h in range(self.query_heads)))
        if len(self.kv_of) != self.query_heads or not all(0 <= h < self.kv_heads for h in self.kv_of):
            raise ValueError(f"kv_of must name one of {self.kv_heads} key/value heads for each of {self.query_heads} query heads")

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> HeadLayout:
        """The layout of q `(B, Hq, Nq, D)`, k `(B, Hk, Nk, D)`, v `(B, Hk, Nk, Dv)`."""
        return cls(query_heads=q.shape[1], kv_heads=k.shape[1], head_dim=k.shape[-1], value_dim=v.shape[-1])

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query_heads // self.kv_heads

    def to_groups(self, x: Tensor) -> Tensor:
        """`(B, Hq, ...)` to `(B, Hk, group, ...)`, a view."""
        return x.unflatten(1, (self.kv_heads, self.group))


def over_groups(x: Tensor, y: Tensor) -> Tensor:
    """x `(B, Hk, group, m, j)` @ y `(B, Hk, j, n)`, `(B, Hk, group, m, n)`: a group's rows go together, where a product that broadcasts
    would copy y for each of its heads."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor) -> HeadLayout:
    """Validate the shapes, dtypes and devices of an attention call; return its HeadLayout.

    Raises ValueError or TypeError with one sentence that names what was given and what was expected.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch tensor of shape (batch, heads, tokens, dim), not {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} has {x.ndim} dimensions {tuple(x.shape)}: expected 4, (batch, heads, tokens, dim)")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}: attention needs a floating-point dtype")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: convert them to one dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v are on {q.device}, {k.device}, {v.device}: move them to one device")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v have batch sizes {q.shape[0]}, {k.shape[0]}, {v.shape[0]}: expected one batch size")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"k has (heads, tokens) {tuple(k.shape[1:3])} and v has {tuple(v.shape[1:3])}: expected the same")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has head dim {q.shape[-1]} and k has {k.shape[-1]}: expected the same")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads and k has {k.shape[1]}: the query heads must be a multiple of the key/value heads"
        )
    return HeadLayout.of(q, k, v)
