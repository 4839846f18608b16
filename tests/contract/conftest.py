"""Names of the cases."""

from __future__ import annotations

from typing import Any


def pytest_make_parametrize_id(config: Any, val: object, argname: str) -> str | None:
    """A spec names its case, cut where pytest would replace it by a number: `-k slug` finds long ones too."""
    return val[:90] if isinstance(val, str) and len(val) > 90 else None
