"""The grids hold what they say, and the selections they time are what FlexAttention is given too."""

from __future__ import annotations

import pytest
import torch

from saccade.bench import grids
from saccade.bench.decode_cases import packed_by_row
from saccade.bench.flex import block_mask
from saccade.bench.patterns import cache_pages, random_pages, random_tiles
from saccade.core import Selection
from saccade.ops.decode import Packed

SIZES = [(op, grid, cuda) for op in grids.OPS for grid in grids.GRIDS for cuda in (False, True)]


@pytest.mark.parametrize(("op", "grid", "cuda"), SIZES)
def test_cases_are_different_and_fit_the_gpu(op: str, grid: str, cuda: bool) -> None:
    cases = grids.cases(op, grid, cuda=cuda)
    labels = [(case.label, case.grad) for case in cases]
    assert len(set(labels)) == len(labels) >= 5
    assert all(0 < case.need < 139e9 for case in cases) and all(case.shape["n"] > 0 for case in cases)


def test_the_full_grid_of_attend_covers_the_axes() -> None:
    cases = grids.cases("attend", "full", cuda=True)
    dense = [case.shape for case in cases if case.family == "dense forward"]
    assert {shape["n"] for shape in dense} == {1024 * 2**i for i in range(8)}
    assert {shape["dim"] for shape in dense} == {64, 128, 256} and {shape["batch"] for shape in dense} == {1, 4}
    assert {shape["heads"] // shape["kv_heads"] for shape in dense} == {1, 4, 8}
    assert {case.shape["density"] for case in cases if case.family == "tiles"} == {1.0, 0.5, 0.2, 0.1, 0.05, 0.01}
    assert {case.shape["n"] for case in cases if case.family == "dense forward+backward"} == {1024 * 2**i for i in range(8)}


def test_only_some_families_and_names_that_do_not_exist() -> None:
    found = grids.cases("scan", "quick", cuda=False, only=["kda", "delta"])
    assert {case.family for case in found} == {"kda", "delta"}
    with pytest.raises(ValueError, match="do you mean 'gated delta'"):
        grids.cases("scan", "quick", cuda=False, only=["gated-delta"])
    with pytest.raises(ValueError, match="no op that is benchmarked"):
        grids.cases("magic", "quick", cuda=False)
    with pytest.raises(ValueError, match="no option of quant"):
        grids.single("quant", None, {"kv_heads": 2, "n": 64})
    with pytest.raises(ValueError, match="no multiple"):
        grids.single("estimate", None, {"heads": 3, "kv_heads": 2, "n": 128})
    with pytest.raises(ValueError, match="no form of scan"):
        grids.single("scan", "magic", {"n": 64})


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_the_block_mask_means_what_the_selection_means(density: float) -> None:
    selection = random_tiles(1024, 2, 128, density, "cpu")
    mask = block_mask(selection)
    rows, keys = torch.arange(1024)[:, None], torch.arange(1024)
    whole = mask.full_kv_num_blocks
    assert whole is not None and int(whole.sum() + mask.kv_num_blocks.sum()) == int(selection.start_counts.sum())
    listed = mask.to_dense().bool().repeat_interleave(128, -1).repeat_interleave(128, -2)
    assert torch.equal(listed & (keys <= rows), selection.dense_mask())


def test_what_flex_can_not_express_is_skipped_with_a_reason() -> None:
    from saccade.bench.case import Skip

    for selection in (random_pages(512, 1, 128, 16, 0.3, "cpu"), random_pages(512, 1, 128, 1, 0.3, "cpu"), Selection.full(500, 500)):
        with pytest.raises(Skip, match="FlexAttention"):
            block_mask(selection)


@pytest.mark.parametrize("page", [1, 16])
def test_random_pages_have_about_the_density_asked_for(page: int) -> None:
    selection = random_pages(1024, 4, 128, page, 0.2, "cpu")
    assert abs(selection.density() - 0.2) < 0.05 and selection.dense_mask().any(-1).all()


@pytest.mark.parametrize("page", [1, 16])
def test_cache_pages_read_as_many_keys_as_asked_for(page: int) -> None:
    selection = cache_pages(256, 64, 2, 3, page, "cpu")
    assert (selection.dense_mask().sum(-1) == 64).all()
    with pytest.raises(ValueError, match="multiples of the page"):
        cache_pages(250, 64, 1, 1, 16, "cpu")


def test_a_cache_packed_row_by_row_is_the_same_cache() -> None:
    x = torch.randn(3, 2, 256, 32, generator=torch.Generator().manual_seed(0))
    for granularity, group in (("channel", 128), ("token", 32)):
        ours, whole = packed_by_row(x, 4, granularity, group), Packed.of(x, 4, granularity=granularity, group=group)
        assert torch.equal(ours.read(), whole.read())
