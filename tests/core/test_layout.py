"""HeadLayout, and the checks every attention call begins with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.core import HeadLayout, check_attention_inputs, over_groups
from tests.core.cases import few


@few
@given(st.integers(1, 6), st.integers(1, 5))
def test_equal_consecutive_groups_are_the_default(kv_heads: int, group: int) -> None:
    layout = HeadLayout(query_heads=kv_heads * group, kv_heads=kv_heads, head_dim=8, value_dim=4)
    assert layout.group == group
    assert list(layout.kv_of) == [h // group for h in range(kv_heads * group)]
    x = torch.arange(kv_heads * group).view(1, -1, 1)
    groups = layout.to_groups(x)
    assert groups.shape == (1, kv_heads, group, 1) and groups.data_ptr() == x.data_ptr()
    assert [layout.kv_of[int(h)] for h in groups[0, :, 0, 0]] == list(range(kv_heads))


def test_an_own_map_is_kept() -> None:
    layout = HeadLayout(query_heads=3, kv_heads=2, head_dim=8, value_dim=8, kv_of=(1, 0, 1))
    assert layout.kv_of == (1, 0, 1)


@pytest.mark.parametrize("heads,kv_heads,kv_of", [(3, 2, ()), (2, 0, ()), (2, 2, (0,)), (2, 2, (0, 2)), (2, 2, (0, -1)), (1, 2, ())])
def test_maps_that_do_not_fit_are_refused(heads: int, kv_heads: int, kv_of: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="kv_of"):
        HeadLayout(query_heads=heads, kv_heads=kv_heads, head_dim=8, value_dim=8, kv_of=kv_of)


def call(**changes: object) -> dict[str, object]:
    return {"q": torch.zeros(2, 6, 3, 8), "k": torch.zeros(2, 2, 5, 8), "v": torch.zeros(2, 2, 5, 4), **changes}


def test_a_good_call_gives_its_layout() -> None:
    layout = check_attention_inputs(**call())  # pyright: ignore[reportArgumentType]
    assert layout == HeadLayout(query_heads=6, kv_heads=2, head_dim=8, value_dim=4)


@pytest.mark.parametrize(
    "changes,error,names",
    [
        ({"q": [[1.0]]}, TypeError, "q must be a torch tensor"),
        ({"v": None}, TypeError, "v must be a torch tensor"),
        ({"k": torch.zeros(2, 2, 5)}, ValueError, "k has 3 dimensions"),
        ({"q": torch.zeros(2, 6, 3, 8, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"k": torch.zeros(2, 2, 5, 8).half()}, TypeError, "one dtype"),
        ({"v": torch.zeros(2, 2, 5, 4, device="meta")}, ValueError, "one device"),
        ({"q": torch.zeros(1, 6, 3, 8)}, ValueError, "one batch size"),
        ({"v": torch.zeros(2, 2, 6, 4)}, ValueError, r"\(2, 5\) and v has \(2, 6\)"),
        ({"v": torch.zeros(2, 3, 5, 4)}, ValueError, "expected the same"),
        ({"q": torch.zeros(2, 6, 3, 9)}, ValueError, "head dim 9"),
        ({"q": torch.zeros(2, 5, 3, 8)}, ValueError, "multiple"),
        ({"k": torch.zeros(2, 0, 5, 8), "v": torch.zeros(2, 0, 5, 4)}, ValueError, "multiple"),
    ],
)
def test_inputs_that_do_not_fit_are_named(changes: dict[str, object], error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names) as raised:
        check_attention_inputs(**call(**changes))  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(raised.value)


def test_products_over_groups_are_those_of_each_head() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 4, 5, 6, generator=g), torch.randn(2, 3, 6, 7, generator=g)
    assert torch.allclose(over_groups(x, y), x @ y.unsqueeze(2), atol=1e-6)
