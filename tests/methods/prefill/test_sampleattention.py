"""SampleAttention (sampleattention, 2406.15486): the claims of the paper, on constructed maps and on the pocket model."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.methods.cache.needles import pocket, prompts
from tests.methods.prefill.planted import context, hits, planted, selected
from torch import Tensor

import saccade
from saccade.attach import capture
from saccade.core import Budget, Mass, Selection
from saccade.methods import build
from saccade.methods.prefill.sampleattention import SampleAttention
from saccade.ops import attend
from saccade.ops.estimate import row_sums
from saccade.parts.lists import tile_ends
from saccade.parts.patterns import band_and_columns
from saccade.parts.probe import strided_rows
from saccade.parts.retained import worst_row_mass

N = 700
COLUMNS = [7, 77, 150, 333, 402, 555]
NEAR = [0, 3, 7, 12]
WIDTH = 35  # keys of the local band: 0.05 of N


def random_qkv(n_q: int, n_k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, n_q, 16), (2, 2, n_k, 16), (2, 2, n_k, 16))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


def sampled_mass(q: Tensor, k: Tensor, share: float, scale: float) -> Tensor:
    """Attention that a share of the rows pays to each key, summed over them: `(B, Hq, Nk)`."""
    rows = strided_rows(q.shape[2], share)
    return row_sums(q[:, :, rows], k, rows + k.shape[2] - q.shape[2], scale=scale).columns


def banded(columns: list[int] = COLUMNS) -> tuple[Tensor, Tensor, Tensor, SampleAttention]:
    """A map (scale 1) of a local band and six strong columns, and the method that asks for what the columns hold, almost."""
    q, k, v = planted(N, [columns], [NEAR], column=8.0, diagonal=8.0)
    mass = sampled_mass(q, k, 0.1, 1.0)[0, 0]
    share = float(mass[columns].sum() / mass.sum())
    return q, k, v, SampleAttention(alpha=share - 0.01, window_share=0.05, row_share=0.1, block=16)


def with_columns(columns: list[int], width: int, block: int = 16) -> Selection:
    mask = torch.zeros(1, 1, N, dtype=torch.bool)
    mask[..., columns] = True
    return band_and_columns(mask, width, tile_ends(N, N, block), block).selection(n_q=N, n_k=N, block=block)


# -- the card's evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"alpha": 1.0}, {"window_share": 1.0}], ids=str)
@pytest.mark.parametrize(("n_q", "n_k"), [(300, 300), (50, 300)])
def test_opened_equals_dense(fields: dict[str, float], n_q: int, n_k: int) -> None:
    method = SampleAttention(**fields)
    q, k, v = random_qkv(n_q, n_k)
    exact = attend(q.double(), k.double(), v.double()).out
    rounding = (attend(q, k, v).out - exact).abs().max()
    selection = selected(method, q, k, v)
    assert selection.density() == 1.0
    assert (attend(q, k, v, selection).out - exact).abs().max() <= 2 * rounding + 1e-6
    ran: list[Selection | None] = []
    method.attend(context(q, k, v, ran=ran), q, k, v)
    assert ran == [None]


def test_planted_columns_are_chosen_and_every_row_keeps_its_mass() -> None:
    q, k, v, method = banded()
    found = selected(method, q, k, v, 1.0)
    listed = found.tokens[0, 0, -1, : int(found.token_counts[0, 0, -1])].tolist()
    assert listed == COLUMNS  # these and no others
    worst = float(worst_row_mass(found, q, k, 1.0))
    assert worst >= method.alpha - 0.05 and worst > 0.9


def test_the_band_alone_retains_little() -> None:
    q, k, v, method = banded()
    band = float(worst_row_mass(with_columns([], WIDTH), q, k, 1.0))
    assert band < 0.3 < 0.9 < float(worst_row_mass(selected(method, q, k, v, 1.0), q, k, 1.0))


def test_uniform_columns_need_far_more_for_the_same_mass() -> None:
    """Even eight times as many columns at a constant distance leave some row with less than half of what the chosen ones keep."""
    q, k, v, method = banded()
    worst = float(worst_row_mass(selected(method, q, k, v, 1.0), q, k, 1.0))
    for step in (117, 58, 29, 14):
        uniform = with_columns(list(range(3, N, step)), WIDTH)
        assert float(worst_row_mass(uniform, q, k, 1.0)) < 0.5 * worst


def test_sampled_column_mass_converges() -> None:
    """The error of the column means falls about as the square root of the rows; at share 1 it is 0."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 8, 1024, 16, generator=generator) for _ in range(2))
    q = 2 * q
    exact = sampled_mass(q, k, 1.0, 0.25) / 1024
    errors = []
    for share in (0.02, 0.08, 0.32):
        errors.append(float((sampled_mass(q, k, share, 0.25) / len(strided_rows(1024, share)) - exact).norm()))
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(1.4 < ratio < 3.2 for ratio in ratios), ratios  # 2 for four times the rows
    logits = (q @ k.mT * 0.25).masked_fill(torch.ones(1024, 1024, dtype=torch.bool).triu(1), -torch.inf)
    assert (logits.softmax(-1).mean(2) - exact).abs().max() < 1e-6


# -- the definition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), [(300, 300), (83, 300)])
def test_what_is_read_is_the_equation(n_q: int, n_k: int) -> None:
    """Fewest columns with the share of the sampled mass, and the band, for each query head; tiles of one row are exact."""
    q, k, v = random_qkv(n_q, n_k, torch.float64)
    method = SampleAttention(alpha=0.4, row_share=0.1, window_share=0.07, block=1)
    mask = selected(method, q, k, v).dense_mask()
    rows, keys = torch.arange(n_k - n_q, n_k).unsqueeze(-1), torch.arange(n_k)
    logits = (q @ k.repeat_interleave(3, 1).mT * 0.25).masked_fill(keys > rows, -torch.inf)
    mass = logits.softmax(-1)[:, :, strided_rows(n_q, 0.1)].sum(2)
    count = Budget(Mass(0.4)).counts(mass)
    best = torch.sort(mass, dim=-1, descending=True, stable=True).indices
    for b in range(2):
        for h in range(6):
            columns = torch.zeros(n_k, dtype=torch.bool)
            columns[best[b, h, : count[b, h]]] = True
            assert torch.equal(mask[b, h], ((rows - keys < 21) | columns) & (keys <= rows))


def test_columns_in_the_band_are_not_listed_twice() -> None:
    q, k, v = random_qkv(300, 300)
    found = selected(SampleAttention(alpha=0.6, block=16), q, k, v)
    assert torch.equal(found.pairs(), found.dense_mask().sum((-1, -2)))


@pytest.mark.parametrize("n_q", [40, 128, 300])
def test_chunk_after_a_prompt(n_q: int) -> None:
    q, k, v, _ = banded()
    found = selected(SampleAttention(alpha=0.75, window_share=0.05, block=16), q[:, :, -n_q:], k, v, 1.0)
    assert found.coverage()[0, 0, -1, COLUMNS].all()
    assert (found.n_q, found.n_k) == (n_q, N) and bool(found.dense_mask().any(-1).all())


def test_no_value_from_the_future() -> None:
    q, k, v = random_qkv(300, 300)
    method, other = SampleAttention(alpha=0.5, block=16), v.clone()
    other[:, :, 120:] = 7.0
    a, b = (method.attend(context(q, k, x), q, k, x) for x in (v, other))
    assert torch.equal(a[:, :, :120], b[:, :, :120])
    assert not torch.equal(a[:, :, 120:], b[:, :, 120:])


@pytest.mark.parametrize(("field", "value"), [
    ("alpha", 0.0), ("alpha", 1.2), ("row_share", 0), ("window_share", -0.1), ("window_share", True), ("block", 0),
])  # fmt: skip
def test_wrong_fields_are_refused_in_one_sentence(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^sampleattention\({field}=") as caught:
        SampleAttention(**{field: value})
    assert "\n" not in str(caught.value)


def test_spec_round_trip() -> None:
    spec = "sampleattention(alpha=0.9, row_share=0.1)"
    assert build(spec).spec == spec and build("sampleattention") == SampleAttention()


# -- the pocket model ----------------------------------------------------------------------------------------------------


def test_mass_follows_alpha_on_the_pocket_model() -> None:
    ids, _ = prompts(1023, (0.5,))
    with capture(pocket()) as layers, torch.no_grad():
        pocket()(ids, use_cache=False)
    for layer in (layers[0], layers[5]):
        last_density = 0.0
        for alpha in (0.5, 0.8, 0.95):
            found = selected(SampleAttention(alpha=alpha), layer.q, layer.k, layer.v)
            assert float(found.mass(layer.q, layer.k).mean()) >= alpha - 0.1
            assert last_density < found.density() < 0.9
            last_density = found.density()


@pytest.mark.parametrize(
    ("spec", "length", "most"),
    [("sampleattention", 1024, 0.7), pytest.param("sampleattention(alpha=0.8)", 2048, 0.45, marks=pytest.mark.slow)],
)
def test_needles_are_found(spec: str, length: int, most: float) -> None:
    ids, answers = prompts(length - 1, (0.3, 0.7))
    found, density = hits(ids, answers, spec)
    assert found == 2 and density < most


def test_decoding_is_dense() -> None:
    q, k, v = random_qkv(1, 300)
    ran: list[Selection | None] = []
    method = replace(SampleAttention(), alpha=0.3)
    out = method.attend(context(q, k, v, ran=ran), q, k, v)
    assert ran == [None] and torch.equal(out, saccade.attention(q, k, v))
