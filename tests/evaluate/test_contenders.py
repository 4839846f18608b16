"""Specs of a comparison."""

from __future__ import annotations

from saccade.evaluate.contenders import contender


def test_policies_in_a_row_are_one_contender() -> None:
    found = contender("snapkv( budget=0.5 )| zipcache + quest(page_size=8)")
    assert found.spec == "snapkv(budget=0.5)|zipcache+quest(page_size=8)" and found.slug == "snapkv|zipcache+quest"
    assert sorted(method.info.slug for method in found.members) == ["quest", "snapkv", "zipcache"]
    assert contender(found.spec).spec == found.spec
