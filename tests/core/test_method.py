"""Methods: built from fields, known by their slug, written back as the spec that builds them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass

import pytest

from saccade.core import REGISTRY, Decode, Info, LayerContext, Mass, Method, Prefill, Selection, parse_spec, register


@dataclass(frozen=True, kw_only=True)
class Everything(Prefill):
    """A method with a field of each kind."""

    budget: float | Mass = 0.5
    window: int = 4
    name: str = "all"

    info = Info(slug="everything-test", phase="prefill")

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError("window must be at least 0")

    def select(self, ctx: LayerContext, q, k, v) -> Selection:
        return Selection.full(q.shape[2], k.shape[2])


def test_the_spec_builds_the_same_method() -> None:
    assert Everything().spec == "everything-test"
    made = Everything(budget=Mass(0.9), name="a, (b)")
    assert made.spec == "everything-test(budget=Mass(0.9), name='a, (b)')"
    slug, given = parse_spec(made.spec)
    assert slug == "everything-test" and Everything.from_fields(given) == made


def test_fields_are_checked() -> None:
    with pytest.raises(ValueError, match="no field 'windw': did you mean window"):
        Everything.from_fields({"windw": 3})
    with pytest.raises(ValueError, match="no field 'zzz': did you mean budget, window, name"):
        Everything.from_fields({"zzz": 3})
    with pytest.raises(ValueError, match="at least 0"):
        Everything.from_fields({"window": -1})
    with pytest.raises(ValueError, match="can't be built"):
        Everything.from_fields({"window": "four"})
    with pytest.raises(FrozenInstanceError):
        Everything().window = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_slug_belongs_to_one_method() -> None:
    try:
        assert register(Everything) is Everything is REGISTRY["everything-test"]
        assert register(Everything) is Everything  # a module that is loaded again

        @dataclass(frozen=True, kw_only=True)
        class Another(Everything):
            info = Info(slug="everything-test", phase="prefill")

        with pytest.raises(ValueError, match="two methods are called 'everything-test'"):
            register(Another)
        assert REGISTRY["everything-test"] is Everything
    finally:
        REGISTRY.pop("everything-test", None)


def test_hooks_that_must_be_written_are_missed() -> None:
    for kind in (Method, Prefill, Decode):
        abstract = getattr(kind, "__abstractmethods__", frozenset())
        if abstract:
            with pytest.raises(TypeError, match="abstract"):
                kind()
