"""RazorAttention (razorattention, 2407.15891): the probe, the averaged token, ragged storage, and needles on the pocket model."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from tests.cache.single import Single, random_qkv
from tests.contract.harness import error, llama, logits, tokens
from tests.methods.cache.needles import pocket, prompts
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.cache.counted import CountedSegment
from saccade.core import Plan
from saccade.evaluate.text import shipped_text
from saccade.methods.cache.razorattention import RazorAttention
from saccade.ops import attend
from saccade.parts.alibi import alibi_keep, alibi_reach
from saccade.parts.echo import echo_scores, places_of, repeated_ids


def plan_of(*places: list[float]) -> Plan:
    """A plan in which heads stand at these places by induction, one list a layer, and last by echo."""
    tensors = {f"layer.{i}.induction_place": torch.tensor(own, dtype=torch.float64) for i, own in enumerate(places)}
    tensors |= {f"layer.{i}.echo_place": torch.ones(len(own), dtype=torch.float64) for i, own in enumerate(places)}
    return Plan(slug="razorattention", spec="razorattention", fingerprint="", tensors=tensors, notes={})


def single(policy: RazorAttention, *places: float) -> Single:
    one = Single(policy)
    one.runner.plans = {"razorattention": plan_of(list(places))}
    return one


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, impl="reference").out


# -- the averaged token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_identical_dropped_keys_are_made_up_for_exactly(batch: int) -> None:
    q, k, v = random_qkv(70, batch=batch)
    k[:, :, 3:50] = k[:, :, 3:4]
    runs = {}
    for compensate in (True, False):
        one = single(RazorAttention(local=20, divisor=1000, sinks=3, interval=4, compensate=compensate), 0.0, 1.0)
        one.feed(q[:, :, :60], k[:, :, :60], v[:, :, :60])
        runs[compensate] = one.steps(q[:, :, 60:], k[:, :, 60:], v[:, :, 60:])
        # the second head drops: 23 stay, and up to 4 more between two cuts; the first is a retrieval head
        held = one.layer.lengths()
        assert all(row[0] == 70 and 23 + compensate <= row[1] <= 27 + compensate for row in held)
    whole = dense(q, k, v)[:, :, 60:]
    assert (runs[True] - whole).abs().max() < 1e-12, "some steps drop more, which moves the means by counts"
    assert (runs[False] - whole)[:, :2].abs().max() < 1e-12
    assert (runs[False] - whole)[:, 2:].abs().max() > 1e-2


def test_later_drops_move_the_means_by_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 12, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    positions = torch.arange(12, dtype=torch.int32).expand(2, 2, 12)
    gone = torch.zeros(2, 2, 12, dtype=torch.bool)
    first, second = gone.clone(), gone.clone()
    first[:, 0, 1:4], second[:, 0, 4:9], second[0, 1, 2] = True, True, True
    both = CountedSegment.folding(CountedSegment.folding(None, k, v, positions, first), k, v, positions, second)
    once = CountedSegment.folding(None, k, v, positions, first | second)
    assert both.counts[..., 0].tolist() == [[8, 1], [8, 0]] and both.lengths() == [[1, 1], [1, 0]]
    assert torch.allclose(both.keys, once.keys) and torch.allclose(both.values[0, 0, 0], v[0, 0, 1:9].mean(0))
    q = torch.randn(2, 4, 3, 4, generator=generator, dtype=torch.float64)
    part = both.attend(q, scale=0.5, softcap=None)
    assert part.lse is not None
    # eight copies of the mean are what the count stands for
    copies = attend(q[:, :2], once.keys[:, :1].expand(-1, -1, 8, -1), once.values[:, :1].expand(-1, -1, 8, -1), causal=False, scale=0.5,
                    return_lse=True, impl="reference")  # fmt: skip
    assert torch.allclose(part.out[:, :2], copies.out) and torch.allclose(part.lse[:, :2], copies.lse)
    assert bool((part.lse[1, 2:] == -torch.inf).all()) and bool((part.out[1, 2:] == 0).all())
    back = both.before(5)
    assert back.counts[0, 0].item() == 4 and both.before(0).length == 0
    assert both.take_rows(torch.tensor([1])).lengths() == [[1, 0]]


def test_removing_the_count_raises_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many dropped keys of one cluster: the mean stands for all of them, counted once it is next to nothing."""
    q, k, v = random_qkv(200, seed=5)
    k, v = 0.1 * k + 0.5, v + 1

    def run() -> float:
        one = single(RazorAttention(local=16, divisor=1000, sinks=2), 1.0, 1.0)
        one.feed(q[:, :, :199], k[:, :, :199], v[:, :, :199])
        return float((one.steps(q[:, :, 199:], k[:, :, 199:], v[:, :, 199:]) - dense(q, k, v)[:, :, 199:]).norm())

    counted = run()
    monkeypatch.setattr(Tensor, "log", lambda x: torch.zeros_like(x))
    assert run() > 3 * counted


def test_short_prompts_are_left_alone() -> None:
    q, k, v = random_qkv(40)
    one = single(RazorAttention(local=30, divisor=1000, sinks=10), 1.0, 1.0)
    one.feed(q[:, :, :39], k[:, :, :39], v[:, :, :39])
    got = one.steps(q[:, :, 39:], k[:, :, 39:], v[:, :, 39:])
    assert one.layer.lengths() == [[40, 40]] and (got - dense(q, k, v)[:, :, 39:]).abs().max() < 1e-12


def test_buffer_is_a_part_of_the_length_but_never_below_local() -> None:
    for n, buffer in ((100, 25), (48, 16)):
        q, k, v = random_qkv(n)
        one = single(RazorAttention(local=16, divisor=4, sinks=2), 0.0, 1.0)
        one.feed(q, k, v)
        one.end_prompt()
        assert one.layer.lengths() == [[n, buffer + 3]]
        assert one.kept()[1] == [0, 1, *range(n - buffer, n)]


def test_memory_is_freed_head_by_head() -> None:
    q, k, v = random_qkv(1000)
    one = single(RazorAttention(local=100, divisor=1000, sinks=4), 0.0, 1.0)
    one.feed(q, k, v)
    one.end_prompt()
    entry = 2 * 8 * 8  # a key and a value of 8 channels in float64
    assert one.layer.lengths() == [[1000, 105]]
    # the storage of means is there for all heads
    assert one.layer.kv_bytes == (1000 + 104 + 2) * entry


def test_taking_back_and_reordering_keep_the_means() -> None:
    model, ids = llama(), tokens(2, 90)
    plan = Plan(**{**vars(plan_of([0.0, 1.0], [1.0, 1.0])), "fingerprint": saccade.core.fingerprint(model)})
    with saccade.attach(model, cache="razorattention(local=12,divisor=1000,sinks=2)", plan=plan), torch.no_grad():
        c = DynamicCache(config=model.config)
        model(ids[:, :80], past_key_values=c)
        once = [model(ids[:, i : i + 1], past_key_values=c).logits for i in range(80, 90)]
        c.crop(-6)
        again = [model(ids[:, i : i + 1], past_key_values=c).logits for i in range(84, 90)]
        assert max(error(a, b) for a, b in zip(once[4:], again, strict=True)) < 1e-6
        c.reorder_cache(torch.tensor([1, 0]))
        turned = model(ids[[1, 0], :1], past_key_values=c).logits
        c.crop(-1)
        c.reorder_cache(torch.tensor([1, 0]))
        assert error(turned[[1, 0]], model(ids[:, :1], past_key_values=c).logits) < 1e-6


# -- the search for heads --------------------------------------------------------------------------------------------------


def test_scores_are_the_sums_over_earlier_copies() -> None:
    q, k, v = random_qkv(2 + 4 * 9)
    out = attend(q, k, v, return_lse=True, impl="reference")
    assert out.lse is not None
    echo, induction = echo_scores(q, k, out.lse, period=9, lead=2, scale=8**-0.5)
    weights = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5 - out.lse.unsqueeze(-1)).exp().tril()[0]
    for h in range(4):
        sums = [[weights[h, i, [j + after for j in range(2, i) if (i - j) % 9 == 0]].sum() for i in range(11, 38)] for after in (0, 1)]
        assert echo[0, h] == pytest.approx(float(torch.tensor(sums[0]).mean()))
        assert induction[0, h] == pytest.approx(float(torch.tensor(sums[1]).mean()))


def test_probe_repeats_ordinary_tokens() -> None:
    batch = torch.tensor([[1, 7, 9, 11, 2, 13], [1, 8, 9, 2, 2, 12]])
    ids = repeated_ids(batch, 50, 3, frozenset({0, 1, 2}))
    assert ids.shape == (2, 151) and ids[:, 0].tolist() == [1, 1]
    body = ids[:, 1:].unflatten(1, (3, 50))
    assert bool((body == body[:, :1]).all()) and set(body.flatten().tolist()) == {7, 8, 9, 11, 12, 13}
    assert torch.equal(ids, repeated_ids(batch, 50, 3, frozenset({0, 1, 2})))
    with pytest.raises(ValueError, match="special tokens only"):
        repeated_ids(batch[:, :1], 5, 2, frozenset({1}))


def test_shares_take_the_best_heads_of_the_whole_model() -> None:
    places = places_of([torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.9]), torch.tensor([0.0, 0.2])])
    assert [[round(6 * x) for x in own.tolist()] for own in places] == [[4, 0], [2, 1], [5, 3]]
    share = torch.cat(places) < 0.34  # 2.04 heads of 6, rounded up
    assert share.tolist() == [False, True, True, True, False, False]


@pytest.mark.slow
def test_probe_ranks_a_trained_induction_head_first() -> None:
    """Two layers trained on repeated random tokens: the second looks up what came after the first time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(320):
        n = int(torch.randint(8, 17, (1,), generator=generator))
        ids = torch.randint(3, 40, (48, n), generator=generator).repeat(1, 3)[:, :40]
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, n:-1].flatten(0, 1), ids[:, n + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    plan = saccade.calibrate(model, "razorattention(distinct=20,repeats=3)", [torch.arange(3, 40)[None]])
    induction = [plan.tensor(layer, "induction") for layer in range(2)]
    assert induction[1].min() > 2 * induction[0].max(), "the heads that copy stand in the second layer"
    ids = torch.randint(3, 40, (8, 16), generator=generator).repeat(1, 2)

    def right(order: list[list[float]]) -> float:
        """Share of the second copy that is predicted with one retrieval head, the others with 4 tokens."""
        own = Plan(**{**vars(plan_of(*order)), "fingerprint": plan.fingerprint})
        with saccade.attach(model, cache="razorattention(induction=0.25,echo=0,local=4,divisor=1000,sinks=0,interval=1)", plan=own):
            got = torch.cat([ids[:, :16], logits_by_step(model, ids)], 1)
        return float((got[:, 17:] == ids[:, 17:]).float().mean())

    best = int(torch.cat(induction).argmax())
    assert right([[float(best != 2 * layer + head) for head in range(2)] for layer in range(2)]) > 0.1 + right([[1.0, 1.0], [1.0, 1.0]])


def logits_by_step(model: transformers.PreTrainedModel, ids: Tensor) -> Tensor:
    """Predicted ids `(B, N / 2)` of the second half, fed token by token."""
    found = logits(model, ids[:, :-1], steps=15)[:, 15:].argmax(-1)
    return found


@cache
def pocket_plan() -> Plan:
    text = shipped_text()
    return saccade.calibrate(pocket(), "razorattention(distinct=192,repeats=3)", [torch.tensor([[1, *(b + 3 for b in text[:400])]])])


def answers(spec: str, ids: Tensor, wanted: list[bytes], plan: Plan) -> tuple[int, float]:
    """Needles found, and the bytes of the cache as a share of the dense one's."""
    model = pocket()
    with saccade.attach(model, cache=spec, plan=plan) as handle:
        out = model.generate(ids, max_new_tokens=max(map(len, wanted)) + 1, do_sample=False, pad_token_id=0, eos_token_id=2)
        stats = handle.stats()
    texts = [bytes(max(0, token - 3) for token in row) for row in out[:, ids.shape[1] :].tolist()]
    share = stats.kv_bytes / (len(ids) * stats.tokens_seen * 8 * 2 * 2 * 64 * 4)
    return sum(text.startswith(answer + b".") for text, answer in zip(texts, wanted, strict=True)), share


def test_needles_survive_at_a_quarter_of_the_cache() -> None:
    ids, wanted = prompts(1280, (0.15, 0.7), seed=3)
    spec = "razorattention(echo=0,induction=0.12,local=64,divisor=64)"
    hits, share = answers(spec, ids, wanted, pocket_plan())
    assert hits == 2 and share < 0.25
    # the same number of heads, but those that look back least
    turned = {n: 1 - x if n.endswith("place") else x for n, x in pocket_plan().tensors.items()}
    hits, _ = answers(spec, ids, wanted, Plan(**{**vars(pocket_plan()), "tensors": turned}))
    assert hits == 0


# -- ALiBi -----------------------------------------------------------------------------------------------------------------


def test_alibi_reach_bounds_every_weight() -> None:
    """The worst case: the far key gets the largest logit that the norms allow, the near one the smallest."""
    generator = torch.Generator().manual_seed(0)
    w_q, w_k = (torch.randn(12, 6, generator=generator, dtype=torch.float64) * 0.3 for _ in range(2))
    gamma, beta = torch.rand(12, generator=generator, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(w_q @ w_k.mT)
    size = float(gamma.norm())
    query, far, near = u[:, 0] * size, vh[0] * size, -vh[0] * size
    for slope, eps in ((0.25, 1e-3), (0.0625, 1e-2)):
        reach = alibi_reach(slope, w_q, w_k, gamma, beta, eps=eps)

        def weight(distance: float, slope: float = slope) -> float:
            pair = torch.stack([query @ w_q @ (far @ w_k) - slope * distance, query @ w_q @ (near @ w_k)])
            return float(pair.softmax(0)[0])

        assert weight(reach) <= eps < weight(reach - 2 / slope)
    assert alibi_reach(0.5, w_q, w_k, gamma, torch.ones(12)) > alibi_reach(0.5, w_q, w_k, gamma)
    assert alibi_keep(10.2, 4) == 11 and alibi_keep(10.2, 64) == 64
    with pytest.raises(ValueError, match="slope"):
        alibi_reach(0.0, w_q, w_k, gamma)


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [{"echo": 1.5}, {"induction": -0.1}, {"local": 0}, {"sinks": -1}, {"divisor": 0.5}, {"repeats": 1}, {"interval": 0}], ids=str
)
def test_wrong_fields_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"razorattention\\({next(iter(given))}="):
        RazorAttention(**given)  # pyright: ignore[reportArgumentType]


def test_a_probe_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="make the probe shorter"):
        saccade.calibrate(llama(), "razorattention", [tokens(1, 50)])
