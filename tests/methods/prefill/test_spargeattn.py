"""SpargeAttn (spargeattn, 2502.18137): the claims of the paper, on constructed data and on the pocket model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.contract.models import tiny
from tests.methods.cache.needles import pocket, prompts, streams
from tests.methods.prefill.planted import context as bare_context
from tests.methods.prefill.planted import hits, selected
from torch import Tensor

import saccade
from saccade.core import LayerContext, Plan, Selection
from saccade.methods import build
from saccade.methods.prefill.spargeattn import SpargeAttention
from saccade.ops import attend
from saccade.ops.attend import attend_low_bit
from saccade.parts.crossing import count_within

SMALL = SpargeAttention(top_k=0.25, theta=-1.0, block_q=32, block_k=32, qk="same")


def random_qkv(n_q: int, n_k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 6, n_q, 16), (2, 2, n_k, 16), (2, 2, n_k, 16))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


def context(
    q: Tensor, k: Tensor, v: Tensor, *, plan: Plan | None = None, ran: list[Selection | None] | None = None
) -> LayerContext:
    """A context whose attention takes another executor, `run=`."""
    scale = q.shape[-1] ** -0.5

    def attended(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, run: Any = attend, **options: Any) -> Tensor:
        if ran is not None:
            ran.append(selection)
        return run(q, k, v, selection, scale=scale, **options).out

    return replace(bare_context(q, k, v, plan=plan), attend=attended)


def plan_of(top_p: list[float], theta: list[float], skip: float = 50.0) -> Plan:
    found = {"top_p": top_p, "theta": theta, "skip": [skip]}
    tensors = {f"layer.0.{name}": torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
    return Plan(slug="spargeattn", spec="spargeattn", fingerprint="", tensors=tensors, notes={})


# -- the card's evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"top_k": 1.0}, {"top_p": 1.0}], ids=str)
@pytest.mark.parametrize(("n_q", "n_k"), [(300, 300), (77, 300)])
def test_everything_equals_the_dense_kernel_in_the_same_numbers(fields: dict[str, float], n_q: int, n_k: int) -> None:
    q, k, v = random_qkv(n_q, n_k)
    ran: list[Selection | None] = []
    out = replace(SMALL, **fields).attend(context(q, k, v, ran=ran), q, k, v)
    assert ran == [None] and torch.equal(out, attend(q, k, v).out)
    low = replace(SMALL, qk="int8", skip=None, **fields)
    ran.clear()
    out = low.attend(context(q, k, v, ran=ran), q, k, v)
    dense = attend_low_bit(q, k, v, block_q=32, block_k=32).out
    assert ran == [None] and torch.equal(out, dense)
    assert selected(low, q, k, v).density() == 1.0
    # the same through the lists
    listed = attend_low_bit(q, k, v, selected(low, q, k, v), block_q=32, block_k=32).out
    assert (listed - dense).abs().max() < 1e-5
    assert 1e-4 < (dense - attend(q, k, v).out).abs().max() < 0.05


def test_filter_that_allows_everything_changes_nothing() -> None:
    q, k, v = random_qkv(300, 300)
    outs = [replace(SMALL, qk="int8", skip=skip).attend(context(q, k, v), q, k, v) for skip in (None, 1e9)]
    assert (outs[0] - outs[1]).abs().max() < 1e-6


@pytest.mark.parametrize("skip", [4.0, 8.0])
def test_skipped_tiles_change_sums_by_less_than_the_bound(skip: float) -> None:
    """Each tile that is left out takes at most block_k * 2^-lambda of a row's sum, so each row keeps nearly all of its weight."""
    q, k, v = random_qkv(400, 400)
    q = 6 * q
    kept, all_of_it = (
        attend_low_bit(q, k, v, block_q=32, block_k=32, skip_below=s, return_lse=True).lse for s in (skip, None)
    )
    assert kept is not None and all_of_it is not None
    lost = 1 - (kept - all_of_it).exp()
    assert float(lost.max()) > 0  # something was skipped
    assert float(lost.max()) <= 13 * 32 * 2**-skip and float(lost.min()) > -1e-5
    method = replace(SMALL, qk="int8", top_k=1.0, skip=skip)
    out = method.attend(context(q, k, v), q, k, v)
    assert torch.equal(out, attend_low_bit(q, k, v, block_q=32, block_k=32, skip_below=skip).out)


def outlier() -> tuple[Tensor, Tensor, Tensor]:
    """One key that all queries look for, among 31 of its block that point the other way; the other blocks are uniform."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(16, 32, generator=generator), dim=-1)
    k = directions.repeat_interleave(32, 0) + 0.02 * torch.randn(512, 32, generator=generator)
    sought = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    k[96:128] = -0.6 * sought + 0.02 * torch.randn(32, 32, generator=generator)
    k[111] = sought
    # the mean key is 0, so that nothing is left when it is taken off
    k = k - k.mean(0)
    q = 60 * sought.expand(512, -1) + torch.randn(512, 32, generator=generator)
    return q[None, None], k[None, None], torch.randn(1, 1, 512, 32, generator=generator)


def test_blocks_that_are_not_uniform_are_always_read() -> None:
    """The mean of the block hides its heavy key; without the rule for such blocks it is lost."""
    q, k, v = outlier()
    late = slice(256, None)
    recall = []
    for theta in (-1.0, 0.9):
        found = selected(replace(SMALL, theta=theta, top_k=0.2, first=False), q, k, v)
        recall.append((bool(found.coverage()[0, 0, 8:, 111].all()), found.density()))
    assert recall[0] == (False, recall[0][1]) and recall[1] == (True, recall[1][1]) and recall[1][1] < 0.6
    weight = (q[0, 0, late] @ k[0, 0].T * 32**-0.5).softmax(-1)[:, 111]
    assert float(weight.min()) > 0.5


# -- the definition ------------------------------------------------------------------------------------------------------


def cosine_of_pairs(x: Tensor) -> float:
    units = x / x.norm(dim=-1, keepdim=True)
    return float((units @ units.T).mean())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("fields", [{"top_k": 0.3}, {"top_p": 0.7}], ids=str)
@pytest.mark.parametrize(("n_q", "n_k"), [(150, 150), (83, 150)])
def test_what_is_read_is_the_equation(n_q: int, n_k: int, fields: dict[str, float], first: bool) -> None:
    q, k, v = random_qkv(n_q, n_k, torch.float64)
    q, theta = 3 * q + 1, 0.12
    k[:, :, 32:64] += 4
    method = replace(SMALL, theta=theta, block_k=16, first=first, **fields)
    found = selected(method, q, k, v).dense_mask()
    moved = k - k.mean(2, keepdim=True)
    blocks = [range(begin, min(begin + 16, n_k)) for begin in range(0, n_k, 16)]
    fixed = 0
    for b in range(2):
        for h in range(6):
            fix_k = [cosine_of_pairs(moved[b, h // 3, list(block)]) <= theta for block in blocks]
            for begin in range(0, n_q, 32):
                rows = list(range(begin, min(begin + 32, n_q)))
                seen = [block for block in range(len(blocks)) if blocks[block][0] <= rows[-1] + n_k - n_q]
                trusted = [block for block in seen if not fix_k[block]]
                fix_q = cosine_of_pairs(q[b, h, rows]) <= theta
                means = torch.stack([moved[b, h // 3, list(blocks[block])].mean(0) for block in seen])
                logits = means @ q[b, h, rows].mean(0) * 0.25
                weights = torch.tensor([float(logits[seen.index(block)]) for block in trusted], dtype=torch.float64).softmax(0)
                share = torch.zeros(len(blocks), dtype=torch.float64)
                share[trusted] = weights
                count = int(0.3 * len(blocks)) if "top_k" in fields else int(count_within(share, torch.tensor(0.7)))
                best = [trusted[i] for i in weights.argsort(descending=True).tolist()[:count]]
                wanted = {block for block in seen if block in best or fix_q or fix_k[block] or (first and block == 0)}
                fixed += sum(fix_k[block] for block in seen) + fix_q
                keys = {j for block in wanted for j in blocks[block]}
                for row in rows:
                    assert set(found[b, h, row].nonzero().flatten().tolist()) == {j for j in keys if j <= row + n_k - n_q}
    assert fixed > 10


def test_all_blocks_fixed_reads_everything() -> None:
    q, k, v = random_qkv(200, 200)
    found = selected(replace(SMALL, theta=1.0), q, k, v)
    assert found.density() == 1.0
    zeros = torch.zeros_like(k)
    assert bool(torch.isfinite(SMALL.attend(context(q, zeros, v), q, zeros, v)).all())


def test_plan_gives_each_head_its_settings() -> None:
    q, k, v = random_qkv(300, 300)
    q = 2 * q
    top_p, theta = [0.3, 0.9, 0.5, 1.0, 0.7, 0.2], [-1.0, 0.01, -0.5, 0.0, 0.02, 1.0]
    found = selected(SMALL, q, k, v, plan=plan_of(top_p, theta)).dense_mask()
    for head in range(6):
        own = selected(replace(SMALL, top_p=top_p[head], theta=theta[head]), q, k, v).dense_mask()
        assert torch.equal(found[:, head], own[:, head])
    with pytest.raises(ValueError, match="this spargeattn plan is for 2 heads, layer 0 has 6"):
        selected(SMALL, q, k, v, plan=plan_of([0.1, 0.2], [0.0, 0.0]))
    ran: list[dict[str, Any]] = []
    ctx = replace(context(q, k, v, plan=plan_of(top_p, theta, skip=7.0)), attend=_noting(ran))
    replace(SMALL, qk="int8").attend(ctx, q, k, v)
    assert ran[0]["skip_below"] == 7.0 and ran[0]["run"] is attend_low_bit


def _noting(ran: list[dict[str, Any]]) -> Any:
    def run(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Tensor:
        ran.append(options)
        return q

    return run


@pytest.mark.parametrize("qk", ["same", "int8"])
def test_no_value_from_the_future(qk: Any) -> None:
    q, k, v = random_qkv(300, 300)
    other, method = v.clone(), replace(SMALL, qk=qk)
    other[:, :, 120:] = 7.0
    a, b = (method.attend(context(q, k, x), q, k, x) for x in (v, other))
    assert torch.equal(a[:, :, :120], b[:, :, :120])
    assert not torch.equal(a[:, :, 120:], b[:, :, 120:])


@pytest.mark.parametrize("qk", ["int8", "fp8"])
def test_products_are_in_low_bits_at_the_public_doors(qk: Any) -> None:
    """Not only in a context made for tests: `saccade.attention` and an attached model hand the numbers on."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, 96, 16, generator=generator) for heads in (4, 2, 2))
    out = saccade.attention(q, k, v, method=replace(SMALL, qk=qk, top_k=1.0))
    assert saccade.last_run().op == "attend_low_bit"
    exact = attend(q, k, v, causal=True, impl="reference").out
    assert 0 < float((out - exact).norm() / exact.norm()) < 0.1
    model = tiny("llama", torch.float32)
    with saccade.attach(model, prefill=replace(SMALL, qk=qk)), torch.no_grad():
        assert torch.isfinite(model(torch.arange(3, 93)[None]).logits).all()
        assert saccade.last_run().op == "attend_low_bit"


def test_decoding_is_dense() -> None:
    q, k, v = random_qkv(1, 300)
    ran: list[Selection | None] = []
    out = SpargeAttention().attend(context(q, k, v, ran=ran), q, k, v)
    assert ran == [None] and torch.equal(out, attend(q, k, v).out)


@pytest.mark.parametrize(("field", "value"), [
    ("top_k", 0.0), ("top_k", True), ("top_p", 1.5), ("theta", -2), ("skip", -1), ("first", 1), ("qk", "int4"), ("block_q", 0),
    ("block_k", 1.5), ("l1", -0.1), ("l2", "a"), ("thetas", 0),
])  # fmt: skip
def test_wrong_fields_are_refused_in_one_sentence(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^spargeattn\({field}=") as caught:
        SpargeAttention(**{field: value})
    assert "\n" not in str(caught.value)


def test_spec_round_trip() -> None:
    spec = "spargeattn(top_p=0.98, theta=0.6)"
    assert build(spec).spec == spec and build("spargeattn") == SpargeAttention()


# -- the offline tuner ---------------------------------------------------------------------------------------------------


def tuned(method: SpargeAttention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Plan, dict[str, Tensor]]:
    sums = method.measure(context(q, k, v), q, k, v)
    found = method.conclude(sums)
    tensors = {f"layer.0.{name}": value for name, value in found.items()}
    return Plan(slug="spargeattn", spec="", fingerprint="", tensors=tensors, notes={}), sums


def peaked(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of 32 keys around a common direction each; each query block looks for two of them, some heads more sharply."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(n // 32, 16, generator=generator)
    k = (centres.repeat_interleave(32, 0) + 0.3 * torch.randn(n, 16, generator=generator)).expand(1, 2, n, 16).contiguous()
    wanted = centres[torch.randint(n // 32, (6, n // 32), generator=generator)] + centres[:, None].mean(0)
    sharp = torch.tensor([4.0, 3.0, 2.0, 1.5, 1.0, 0.05]).view(6, 1, 1)
    q = (sharp * wanted.repeat_interleave(32, 1) + 0.3 * torch.randn(6, n, 16, generator=generator)).unsqueeze(0)
    return q, k, torch.randn(1, 2, n, 16, generator=generator)


def test_tuned_error_is_below_the_bound() -> None:
    method = replace(SMALL, l1=0.08, thetas=8)
    q, k, v = peaked(512)
    plan, sums = tuned(method, q, k, v)
    dense = attend(q, k, v).out
    out = method.attend(context(q, k, v, plan=plan), q, k, v)
    errors = (out - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
    assert (errors < 0.08).all() and errors.max() > 0.01
    sparsity = 1 - selected(method, q, k, v, plan=plan).density_by_head()[0]
    assert float(sparsity[:2].min()) > 0.3
    # a head that looks everywhere is dense
    assert float(sparsity[5]) == 0.0 and float(plan.tensor(0, "top_p")[5]) == 1.0
    # a looser bound leaves out more
    loose, _ = tuned(replace(method, l1=0.3), q, k, v)
    assert selected(method, q, k, v, plan=loose).density() < selected(method, q, k, v, plan=plan).density()
    assert sums["top_p"].shape == sums["sparsity"].shape == (6, 8) and float(plan.tensor(0, "skip")) == 64.0


def test_filter_is_the_smallest_with_all_errors_below_the_bound() -> None:
    """With 8-bit products and a filter, still below l2; one that is smaller by a step of the search is not."""
    method = replace(SMALL, qk="int8", l1=0.08, l2=0.06, thetas=4)
    q, k, v = peaked(256)
    plan, _ = tuned(method, q, k, v)
    dense, skip = attend(q, k, v).out, float(plan.tensor(0, "skip"))
    assert 1 < skip < 64

    def error(skip: float) -> float:
        plan.tensors["layer.0.skip"] = torch.tensor([skip])
        out = method.attend(context(q, k, v, plan=plan), q, k, v)
        return float(((out - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))).max())

    assert error(skip) < 0.06 <= error(skip - 1)


def test_best_theta_has_the_sparsest_neighbourhood() -> None:
    method = replace(SMALL, thetas=5)
    sparsity = torch.tensor([[0.1, 0.9, 0.1, 0.5, 0.55], [0.6, 0.6, 0.1, 0.1, 0.1]])
    top_p = torch.arange(10.0).view(2, 5)
    found = method._best(top_p, sparsity)
    assert [x.tolist() for x in found] == [[4.0, 5.0], pytest.approx([0.6, -1.0])]
    # too little to be left out: dense
    assert method._best(top_p, sparsity / 10)[0].tolist() == [1.0, 1.0]


def test_sums_over_samples_become_means() -> None:
    method = replace(SMALL, thetas=4)
    sums = [method.measure(context(*x), *x) for x in (peaked(256), tuple(t.roll(64, 2) for t in peaked(256)))]
    both = method.conclude({name: sums[0][name] + sums[1][name] for name in sums[0]})
    sparsity = (sums[0]["sparsity"] + sums[1]["sparsity"]) / 2
    top_p, theta = method._best((sums[0]["top_p"] + sums[1]["top_p"]) / 2, sparsity)
    assert torch.equal(both["theta"], theta) and torch.equal(both["top_p"], top_p)
    assert float(both["skip"]) == float(sums[0]["skip"] + sums[1]["skip"]) / 2


# -- the pocket model ----------------------------------------------------------------------------------------------------


def test_needles_are_found() -> None:
    ids, answers = prompts(1087, (0.3, 0.7))
    found, density = hits(ids, answers, "spargeattn(top_k=0.15, block_q=32, block_k=32, theta=0.3)")
    assert found == 2 and density < 0.6


@pytest.mark.slow
def test_needles_are_found_with_a_plan() -> None:
    plan = saccade.calibrate(pocket(), "spargeattn(qk='same', thetas=8)", [streams(1, 1023)])
    found, densities = zip(*(hits(*prompts(n, (0.3, 0.7)), "spargeattn(qk='same')", plan) for n in (1535, 2047, 3071)), strict=True)
    assert sum(found) >= 5 and max(densities) < 0.6
