"""MInference (minference, 2407.02490): the claims of the paper, on constructed maps and on the pocket model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.methods.cache.needles import pocket, prompts, streams
from tests.methods.prefill.planted import context, hits, planted, selected
from torch import Tensor

import saccade
from saccade.attach import capture
from saccade.core import Plan, Selection
from saccade.core.mass import covered_mass
from saccade.methods import build
from saccade.methods.prefill.minference import A_SHAPE, BLOCK_SPARSE, PATTERNS, VERTICAL_SLASH, MInference
from saccade.ops import attend
from saccade.parts import patterns
from saccade.parts.choose import ranks
from saccade.parts.equalcost import largest_within
from saccade.parts.lists import tile_ends

N = 700
COLUMNS, OFFSETS = [77, 150, 333, 402], [128, 171, 290]
SMALL = MInference(columns=60, offsets=80, initial=40, local=120, blocks=4, probe=32, sinks=4, near=20, block=16)


def random_qkv(n_q: int, n_k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 6, n_q, 16), (2, 2, n_k, 16), (2, 2, n_k, 16))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


def mixed_plan(heads: int = 6, length: int = N) -> Plan:
    """Two heads of each shape, with different sizes."""
    shapes = torch.tensor([A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE, VERTICAL_SLASH, A_SHAPE, BLOCK_SPARSE])[:heads]
    sizes = torch.tensor([[40, 120], [60, 80], [4, 0], [10, 150], [5, 33], [9, 0]])[:heads]
    tensors = {"pattern": shapes, "sizes": sizes, "length": torch.tensor([length])}
    return Plan(
        slug="minference", spec="minference", fingerprint="", notes={},
        tensors={f"layer.0.{name}": value for name, value in tensors.items()},
    )  # fmt: skip


def alone(plan: Plan, head: int) -> MInference:
    """The method whose fields give every head what the plan gives this one."""
    shape, (first, second) = int(plan.tensor(0, "pattern")[head]), plan.tensor(0, "sizes")[head].tolist()
    fields = [{"initial": first, "local": second}, {"columns": first, "offsets": second}, {"blocks": first}][shape]
    return replace(SMALL, pattern=PATTERNS[shape], **fields)


# -- the card's evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [
    {"offsets": 1.0}, {"offsets": N, "columns": 1}, {"columns": 1.0, "offsets": 1}, {"pattern": "block-sparse", "blocks": 1.0},
    {"pattern": "a-shape", "local": 1.0},
], ids=str)  # fmt: skip
def test_opened_equals_dense(fields: dict[str, float]) -> None:
    method = replace(SMALL, **fields)
    q, k, v = random_qkv(N, N)
    exact = attend(q.double(), k.double(), v.double()).out
    rounding = (attend(q, k, v).out - exact).abs().max()
    selection = selected(method, q, k, v)
    assert selection.density() == 1.0
    assert (attend(q, k, v, selection).out - exact).abs().max() <= 2 * rounding + 1e-6
    # and attention does not go through the lists when they hold everything
    ran: list[Selection | None] = []
    method.attend(context(q, k, v, ran=ran), q, k, v)
    assert ran == [None]


@pytest.mark.parametrize(("n_q", "n_k"), [(N, N), (210, N), (50, 333)])
def test_every_chosen_column_and_diagonal_is_read_exactly_once(n_q: int, n_k: int) -> None:
    q, k, v = random_qkv(n_q, n_k)
    ranked = SMALL._rank(context(q, k, v), q, k, torch.tensor([VERTICAL_SLASH]))
    assert ranked.vertical is not None and ranked.slash is not None
    found = selected(SMALL, q, k, v)
    mask = found.dense_mask()
    assert torch.equal(found.pairs(), mask.sum((-1, -2)))  # the lists name no pair twice
    rows, keys = torch.arange(n_k - n_q, n_k).unsqueeze(-1), torch.arange(n_k)
    distance = (rows - keys).clamp(min=0).flatten().expand(2, 6, -1)
    diagonals = torch.gather(ranks(ranked.slash) < 80, -1, distance).view(2, 6, n_q, n_k)
    wanted = ((ranks(ranked.vertical) < 60).unsqueeze(2) | diagonals) & (keys <= rows)
    assert not (wanted & ~mask).any()
    assert found.density() < 1.0


def test_probe_finds_planted_columns_and_diagonals() -> None:
    q, k, v = planted(N, [COLUMNS], [OFFSETS])
    method = MInference(columns=30 + len(COLUMNS), offsets=100 + len(OFFSETS))
    ranked = method._rank(context(q, k, v, 1.0), q, k, torch.tensor([VERTICAL_SLASH]))
    assert ranked.vertical is not None and ranked.slash is not None
    columns = (ranks(ranked.vertical)[0, 0] < method.columns).nonzero().flatten().tolist()
    offsets = (ranks(ranked.slash)[0, 0] < method.offsets).nonzero().flatten().tolist()
    assert columns == [*range(30), *COLUMNS]
    assert offsets == [*range(100), *OFFSETS]


def test_output_is_nearer_to_dense_than_the_a_shape_at_equal_cost() -> None:
    q, k, v = planted(N, [COLUMNS], [OFFSETS])
    ends = tile_ends(N, N, 64)
    slashes = selected(MInference(columns=34, offsets=103), q, k, v, 1.0)

    def a_shape(sizes: Tensor) -> Selection:
        return patterns.a_shape(*sizes.unbind(-1), ends, 64, N).selection(n_q=N, n_k=N, block=64)

    sizes = largest_within(
        slashes.pairs() + 20 * N, lambda s: a_shape(s).pairs(), torch.tensor([20.0, 80.0]), least=torch.tensor([1, 1]), most=N
    )
    band = a_shape(sizes)
    assert band.density() > slashes.density()  # the A-shape may even cost more
    dense = attend(q, k, v, scale=1.0).out
    errors = [float((attend(q, k, v, s, scale=1.0).out - dense).norm() / dense.norm()) for s in (slashes, band)]
    assert errors[0] < 0.2 * errors[1], errors


# -- one selection for a layer -------------------------------------------------------------------------------------------


def test_all_heads_run_in_one_call() -> None:
    q, k, v = random_qkv(N, N)
    ran: list[Selection | None] = []
    plan = mixed_plan()
    SMALL.attend(context(q, k, v, plan=plan, ran=ran), q, k, v)
    (selection,) = ran
    assert selection is not None and (selection.heads, selection.block_q, selection.block_k) == (6, 16, 16)
    mask = selection.expand(2, 6).dense_mask()
    for head in range(6):
        own = selected(alone(plan, head), q, k, v).expand(2, 6).dense_mask()
        assert torch.equal(mask[:, head], own[:, head])


def test_indices_belong_to_query_heads() -> None:
    """Two query heads of one key/value head look at different columns and diagonals."""
    q, k, v = planted(N, [COLUMNS[:2], COLUMNS[2:]], [[128], [290]])
    found = selected(MInference(columns=32, offsets=101), q, k, v, 1.0)
    for head, (own, other) in enumerate([(COLUMNS[:2], COLUMNS[2:]), (COLUMNS[2:], COLUMNS[:2])]):
        assert found.coverage()[0, head, -1, own].all()
        assert not found.coverage()[0, head, -1, other].all()


def test_plan_sizes_stay_or_grow_with_the_prompt() -> None:
    plan, (q, k, v) = mixed_plan(length=N // 2), random_qkv(N, N)
    same, grown = (replace(SMALL, growth=growth)._shapes(context(q, k, v, plan=plan), 6, N)[1] for growth in (0.0, 1.0))
    assert torch.equal(same, plan.tensor(0, "sizes"))
    assert torch.equal(grown, 2 * same)
    with pytest.raises(ValueError, match="this minference plan is for 6 heads, layer 0 has 4"):
        SMALL.attend(context(q[:, :4], k, v, plan=plan), q[:, :4], k, v)


def test_forced_ones_come_first_and_are_never_too_many() -> None:
    q, k, v = random_qkv(N, N)
    found = selected(MInference(columns=3, offsets=5, sinks=30, near=100), q, k, v)
    last = found.coverage()[0, :, -1]
    assert last[:, :3].all() and not last[:, 3:30].any()
    assert (last.sum(-1) <= 3 + 128).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_chunk_after_a_prompt(pattern: str) -> None:
    """Queries that are the last of more keys: every row reads something, and the last rows choose."""
    q, k, v = planted(N, [COLUMNS, COLUMNS], [OFFSETS, OFFSETS])
    method = MInference(pattern=pattern, columns=34, offsets=103, initial=8, local=8, blocks=1)
    whole = selected(method, q, k, v, 1.0)
    for n_q in (1, 37, 100, 300):
        found = selected(method, q[:, :, -n_q:], k, v, 1.0)
        assert bool(found.dense_mask().any(-1).all()), "a row that reads nothing"
        if pattern == "vertical-slash" and n_q >= 64:
            last = (found.dense_mask()[:, :, -1], whole.dense_mask()[:, :, -1])
            assert all(row[..., [*COLUMNS, *(N - 1 - o for o in OFFSETS)]].all() for row in last)


@pytest.mark.parametrize("plan", [None, mixed_plan()], ids=["fields", "plan"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_value_from_the_future(pattern: str, plan: Plan | None) -> None:
    q, k, v = random_qkv(N, N)
    method, other = replace(SMALL, pattern=pattern), v.clone()
    other[:, :, 300:] = 7.0
    a, b = (method.attend(context(q, k, x, plan=plan), q, k, x) for x in (v, other))
    assert torch.equal(a[:, :, :300], b[:, :, :300])
    assert not torch.equal(a[:, :, 300:], b[:, :, 300:])


def test_last_rows_may_be_dense() -> None:
    q, k, v = random_qkv(N, N)
    found = selected(replace(SMALL, pattern="a-shape", dense_rows=100), q, k, v)
    rows, keys = torch.arange(N).unsqueeze(-1), torch.arange(N)
    assert torch.equal(found.dense_mask()[0, 0, 600:], (keys <= rows)[600:])
    assert found.density() < 0.7


@pytest.mark.parametrize(("field", "value"), [
    ("pattern", "stripes"), ("columns", 0), ("offsets", 1.5), ("initial", -3), ("local", True), ("blocks", "all"), ("probe", 0),
    ("sinks", -1), ("near", 0.5), ("dense_rows", -1), ("block", 0), ("growth", 2.0),
])  # fmt: skip
def test_wrong_fields_are_refused_in_one_sentence(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^minference\({field}=") as caught:
        MInference(**{field: value})
    assert "\n" not in str(caught.value)


# -- the offline search --------------------------------------------------------------------------------------------------


def found_shapes(method: MInference, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> list[int]:
    return method.conclude(method.measure(context(q, k, v, scale), q, k, v))["pattern"].tolist()


def test_search_gives_each_head_its_shape() -> None:
    """One head looks at its neighbours, one at far columns and diagonals, one at whole blocks."""
    n = 1024
    q, k, v = planted(n, [[], [300, 330, 410, 590], []], [[0, 1, 2], [], []])
    blocky = torch.randint(0, 8, (n // 64,), generator=torch.Generator().manual_seed(1)).repeat_interleave(64)
    for key in range(n):
        k[0, 0, key, 128 + 3 + int(blocky[key]) % 5] += 4.0
    wanted = torch.randint(0, 5, (n // 64,), generator=torch.Generator().manual_seed(2)).repeat_interleave(64)
    q[0, 2, torch.arange(n), 128 + 3 + wanted] = 3.0
    method = MInference(initial=16 / n, local=100 / n)
    found = found_shapes(method, q, k, v, 1.0)
    assert found[1:] == [VERTICAL_SLASH, BLOCK_SPARSE]
    assert found[0] == A_SHAPE  # the diagonals are in reach of all: the first of equals


def test_candidates_cost_the_same() -> None:
    n = 1000
    q, k, v = random_qkv(n, n)
    method = MInference()
    sums = method.measure(context(q, k, v), q, k, v)
    shapes = [shape for shape, _ in method._candidates(n)]
    ranked = method._rank(context(q, k, v), q, k, torch.tensor([VERTICAL_SLASH, BLOCK_SPARSE]))
    assert shapes == [A_SHAPE, *[VERTICAL_SLASH] * 4, BLOCK_SPARSE]
    costs: list[Tensor] = []
    for index, shape in enumerate(shapes):
        sizes = (sums["sizes"][:, index] / 2).expand(2, -1, -1).floor().long()
        lists = method._lists(ranked, torch.full((6,), shape), sizes, n, n)
        costs.append(lists.selection(n_q=n, n_k=n, block=64).pairs().expand(2, 6).double().mean(0))
    for pairs in costs[1:]:
        # one more tile in every row is too many, and sizes of two samples are averaged
        assert (pairs <= 1.1 * costs[0]).all() and (pairs >= 0.7 * costs[0]).all()


def test_sizes_shrink_to_the_sample() -> None:
    method = MInference()
    assert method._candidates(30_000)[:3] == [(A_SHAPE, (1024, 4096)), (VERTICAL_SLASH, (30, 2048)), (VERTICAL_SLASH, (100, 1800))]
    assert method._candidates(60_000) == method._candidates(30_000)
    assert method._candidates(3000)[0] == (A_SHAPE, (102.4, 409.6)) and method._candidates(3000)[-1] == (BLOCK_SPARSE, (10.0, 0.0))
    assert replace(method, initial=0.1, local=0.2)._candidates(500)[0] == (A_SHAPE, (50.0, 100.0))


def test_the_output_decides_not_the_mass() -> None:
    """Local keys hold most of the attention but their values are 0: only the far columns make a difference."""
    q, k, v = planted(1024, [[300, 410, 590]], [[0, 1, 2]], column=9.0)
    v[:, :, [j for j in range(1024) if j not in (300, 410, 590)]] = 0.0
    method = MInference(initial=16, local=100)
    sums = method.measure(context(q, k, v, 1.0), q, k, v)
    assert method.conclude(sums)["pattern"].tolist() == [VERTICAL_SLASH]
    band = selected(replace(method, pattern="a-shape", initial=16, local=100), q, k, v, 1.0)
    assert float(band.mass(q, k, 1.0)) > 0.7
    dense = attend(q, k, v, scale=1.0).out
    tuned = replace(method, pattern="a-shape", initial=1, local=3)  # the sizes at n = 1024, see _candidates
    wrong = (attend(q, k, v, selected(tuned, q, k, v, 1.0), scale=1.0).out - dense).abs() > 5e-3
    assert sums["errors"][0, 0] == wrong.sum()


def test_statistics_add_up_over_samples() -> None:
    method = MInference()
    both = random_qkv(512, 512)
    rows = [tuple(x[i : i + 1] for x in both) for i in range(2)]
    whole = method.measure(context(*both), *both)
    parts = [method.measure(context(*row), *row) for row in rows]
    for name, value in whole.items():
        assert torch.equal(value, parts[0][name] + parts[1][name]), name
    assert float(whole["samples"]) == 2 and float(whole["length"]) == 1024


# -- the pocket model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Made on one sample of 1K tokens, whose sizes grow with the prompt when used."""
    return saccade.calibrate(pocket(), "minference", [streams(1, 1023)])


@pytest.mark.slow
def test_columns_and_diagonals_beat_the_a_shape_where_the_prompt_asks() -> None:
    """At equal pairs, on a retrieving layer and the last 256 rows of a needle prompt, four times those of the probe."""
    ids, _ = prompts(2047, (0.5,))
    with capture(pocket()) as layers, torch.no_grad():
        pocket()(ids, use_cache=False)
    n, generator = ids.shape[1], torch.Generator().manual_seed(0)
    masses = []
    for layer in layers[5:6]:
        q, k, v = layer.q, layer.k, layer.v
        slashes = selected(MInference(columns=0.1, offsets=100), q, k, v)
        ends = tile_ends(n, n, 64)

        def a_shape(sizes: Tensor, ends: Tensor = ends) -> Selection:
            return patterns.a_shape(*sizes.unbind(-1), ends, 64, n).selection(n_q=n, n_k=n, block=64)

        sizes = largest_within(
            slashes.pairs(), lambda s: a_shape(s).pairs(), torch.tensor([40.0, 160.0]), least=torch.tensor([1, 1]), most=n
        )
        shares = slashes.density_by_head()[0, :, None, None]
        drawn = torch.rand(1, 6, slashes.tiles, slashes.tiles, generator=generator) < shares
        random = Selection.from_block_mask(drawn, block_q=64, block_k=64, n_q=n, n_k=n)
        selections = (slashes, a_shape(sizes), random)
        densities = [s.density() for s in selections]
        assert max(densities) - min(densities) < 0.05
        rows = [covered_mass(s, q, k) for s in selections]
        masses.append([(float(r.mean()), float(r[..., -256:].mean())) for r in rows])
    (everywhere, asked) = torch.tensor(masses).mean(0).T.tolist()
    assert asked[0] > 1.1 * asked[1] and asked[0] > 2 * asked[2]
    # over all rows of this model, whose attention is either local or by content, the two are about equal
    assert everywhere[0] > 0.9 * everywhere[1] and everywhere[0] > 2 * everywhere[2]


@pytest.mark.slow
def test_calibrated_shapes_are_at_least_as_good_as_any_one_shape(plan: Plan) -> None:
    ids = streams(1, 1023)
    with capture(pocket()) as layers, torch.no_grad():
        pocket()(ids, use_cache=False)
    chosen = set()
    for layer in layers[::4]:
        method, ctx = MInference(), context(layer.q, layer.k, layer.v)
        sums = method.measure(ctx, layer.q, layer.k, layer.v)
        best = plan.tensor(layer.layer, "pattern")
        chosen |= set(best.tolist())
        shapes = torch.tensor([shape for shape, _ in method._candidates(ids.shape[1])])
        own = torch.where(shapes == best.unsqueeze(-1), sums["errors"], torch.inf).amin(-1)
        assert torch.equal(own, sums["errors"].amin(-1))
    assert len(chosen) > 1  # heads differ


@pytest.mark.slow
def test_needles_are_found_with_a_plan(plan: Plan) -> None:
    ids, answers = prompts(2047, (0.3, 0.7))
    found, density = hits(ids, answers, "minference(growth=1.0)", plan)
    assert found == 2 and density < 0.4


def test_needles_are_found_by_columns_and_not_by_the_a_shape() -> None:
    ids, answers = prompts(1023, (0.3, 0.6))
    slashes, density = hits(ids, answers, "minference(columns=0.1, offsets=0.05)")
    band, more = hits(ids, answers, 'minference(pattern="a-shape", initial=0.03, local=0.13)')
    assert slashes == 2 and band < 2 and density < more


def test_short_prompts_and_decoding_are_dense() -> None:
    ids, _ = prompts(255, (0.5,))
    with saccade.attach(pocket(), prefill="minference") as handle, torch.no_grad():
        attached = pocket()(ids).logits
        assert handle.stats().prefill_density == 1.0
    with torch.no_grad():
        assert (attached - pocket()(ids).logits).abs().max() < 1e-3
    q, k, v = random_qkv(1, N)
    ran: list[Selection | None] = []
    SMALL.attend(context(q, k, v, ran=ran), q, k, v)
    assert ran == [None]


def test_spec_round_trip() -> None:
    spec = "minference(pattern='block-sparse', blocks=0.2)"
    assert build(spec).spec == spec and build("minference") == MInference()
