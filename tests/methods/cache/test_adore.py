"""adore: what comes back is exact where all before it is there, a late question finds what was dropped, and the controller learns."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from tests.contract.harness import copied, error, greedy, llama, logits, tokens
from tests.methods.decode.harness import pocket
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.core import Plan, Rebuilding
from saccade.evaluate.text import grammar
from saccade.methods import build
from saccade.methods.cache.adore import STATES, Adore
from saccade.parts.token_controller import TokenController
from saccade.train.text import NOUNS, insert_at_lines, needle_question, needle_sentence
from saccade.train.token_controller import (
    among_largest,
    attention_means,
    controller_plan,
    new_controller,
    query_places,
    train_token_controller,
)

SMALL = Adore(size=24, rebuild=5, recent=8)


@cache
def controller() -> TokenController:
    return new_controller(llama(), dim=16, hidden=16)


@cache
def plan() -> Plan:
    return controller_plan(llama(), SMALL, controller())


def positions(c: DynamicCache, layer: int = 0) -> list[int]:
    found = c.layers[layer].positions()
    assert bool((found == found[:1, :1]).all()), "one list for all heads"
    return found[0, 0].tolist()


# -- rebuilding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_where_all_that_was_dropped_comes_back_all_is_dense(padded: bool) -> None:
    """With R = what was dropped, every token is there at each step, and each was rebuilt from all before it."""
    ids, mask = tokens(2, 70), torch.ones(2, 70, dtype=torch.long)
    if padded:
        mask[1, :9] = 0
    given = mask if padded else None
    dense = logits(llama(), ids * mask, steps=14, mask=given)
    for method in (Adore(size=24, rebuild=70, recent=8), Adore(size=70, rebuild=0)):
        with saccade.attach(llama(), cache=method, plan=plan()) as handle:
            got = logits(llama(), ids * mask, steps=14, mask=given)
            assert handle.stats().kept == [[min(70, method.size)] * 2] * 2 or method.size == 70
        assert error(got[mask.bool()], dense[mask.bool()]) < 1e-12
    with saccade.attach(llama(), cache=Adore(size=24, rebuild=30, recent=8), plan=plan()):
        assert error(logits(llama(), ids * mask, steps=14, mask=given)[mask.bool()], dense[mask.bool()]) > 1e-3


@torch.no_grad()
def test_a_rebuilt_key_is_the_first_one_in_layer_0_and_sees_todays_cache_above() -> None:
    ids, more = tokens(1, 60), tokens(1, 1, seed=3)
    dense = llama()(ids).past_key_values
    with saccade.attach(llama(), cache=SMALL, plan=plan()) as handle:
        c = llama()(ids).past_key_values
        handle.compress()
        before = positions(c)
        # room for all that comes back, so that it can be looked at
        for layer in c.layers:
            layer.use_methods({})
    wide = Adore(size=40, rebuild=5, recent=8)
    with saccade.attach(llama(), cache=wide, plan=plan()):
        llama()(more, past_key_values=c)
    after = positions(c)
    back = sorted(set(after) - set(before) - {60})
    assert len(before) == 24 and len(back) == 5 and after == sorted([*before, *back, 60])
    assert positions(c, 1) == after, "one list for all layers"
    for place in back:
        for layer, same in ((0, True), (1, False)):
            for side in ("keys", "values"):
                new = getattr(c.layers[layer], side)[:, :, after.index(place)]
                old = getattr(dense.layers[layer], side)[:, :, place]
                assert torch.allclose(new, old, atol=1e-12) == same, (place, layer)
    states = c.layers[0].sequence(None)[STATES]
    sigma = controller().importance(states[:, :60], states[:, 60:61])[0, 0]
    dropped = [j for j in range(60) if j not in before]
    assert back == sorted(sorted(dropped, key=lambda j: -float(sigma[j]))[:5]), "those with the highest sigma"


@torch.no_grad()
def test_release_keeps_the_newest_and_the_highest_sigma() -> None:
    ids = tokens(2, 60)
    with saccade.attach(llama(), cache=SMALL, plan=plan()) as handle:
        c = llama()(ids).past_key_values
        handle.compress()
        for i in range(4):
            states = c.layers[0].sequence(None)[STATES]
            newest = 59 + i
            sigma = controller().importance(states, states[:, -1:])[:, 0]
            assert states.shape == (2, 60 + i, 16)
            for row in range(2):
                here = c.layers[1].positions()[row, 0].tolist()
                assert here == sorted(here) and here[-8:] == list(range(newest - 7, newest + 1)) and len(here) == 24
                if i == 0:
                    best = sigma[row, : newest - 7].topk(16).indices.sort().values.tolist()
                    assert here[:16] == best
            llama()(tokens(2, 1, seed=40 + i), past_key_values=c)


@torch.no_grad()
def test_only_logits_of_new_tokens_come_out() -> None:
    ids, more = tokens(1, 60), tokens(1, 20, seed=3)
    with saccade.attach(llama(), cache=SMALL, plan=plan()) as handle:
        first = llama()(ids).past_key_values
        handle.compress()
        whole = llama()(more, past_key_values=copied(first)).logits
        assert whole.shape[1] == 20
        for asked, wanted in ((1, slice(-1, None)), (7, slice(-7, None)), (torch.tensor([2, 19]), [2, 19])):
            some = llama()(more, past_key_values=copied(first), logits_to_keep=asked).logits
            assert error(some, whole[:, wanted]) < 1e-12
        with pytest.raises(ValueError, match="output_hidden_states can't follow"):
            llama()(more, past_key_values=copied(first), output_hidden_states=True)


@torch.no_grad()
def test_a_decode_method_reads_what_came_back() -> None:
    """An index over all entries finds those that joined between others: with a budget for all, the same as without it."""
    ids = tokens(2, 70)
    with saccade.attach(llama(), cache=SMALL, plan=plan()):
        alone = logits(llama(), ids, steps=10)
    with saccade.attach(llama(), cache=SMALL, decode="quest(page_size=4, budget=1.0, dense_layers=0)", plan=plan()):
        assert error(logits(llama(), ids, steps=10), alone) < 1e-12
    with saccade.attach(llama(), cache=SMALL, prefill="gemfilter(budget=40, at=1)", plan=plan()):
        assert bool(logits(llama(), ids, steps=10).isfinite().all())


@torch.no_grad()
def test_a_saved_run_goes_on(tmp_path: Path) -> None:
    ids, more = tokens(1, 60), tokens(1, 10, seed=3)
    with saccade.attach(llama(), cache=SMALL, plan=plan()) as handle:
        c = llama()(ids).past_key_values
        llama()(more[:, :1], past_key_values=c)
        handle.save(tmp_path / "cache")
        expected = [llama()(more[:, i : i + 1], past_key_values=c).logits for i in range(1, 10)]
    with saccade.attach(llama(), cache=SMALL, plan=plan()):
        c = saccade.load_cache(tmp_path / "cache", llama())
        for i, wanted in enumerate(expected, 1):
            assert torch.equal(llama()(more[:, i : i + 1], past_key_values=c).logits, wanted)


# -- a late question ----------------------------------------------------------------------------------------------------


class Recall(NamedTuple):
    """A text with one fact for each noun, and later a question for one of them. context: tokens before the question. asked: before the
    answer. fact: places of the sentence that holds it."""

    ids: Tensor
    answers: Tensor
    context: int
    asked: int
    fact: slice


def recall_task(rng: Random, length: int) -> Recall:
    text, nouns = grammar(), rng.sample(NOUNS, len(NOUNS))
    facts = [(noun, text.key(rng), text.value(rng)) for noun in nouns]
    sentences = [needle_sentence(*fact).encode() for fact in facts]
    room = length - sum(map(len, sentences))
    context = insert_at_lines(text.haystack(rng, room), [(0.6 * rng.random(), s) for s in sentences]) + b"\n"
    question, answer = needle_question(*facts[0][:2]).encode(), facts[0][2].encode() + b"."
    ids = [1, *(b + 3 for b in context + question + answer)]
    asked, at = 1 + len(context) + len(question), 1 + context.index(sentences[0])
    answers = torch.zeros(1, len(ids), dtype=torch.bool)
    answers[:, asked - 1 : asked - 1 + len(answer)] = True
    return Recall(torch.tensor([ids]), answers, 1 + len(context), asked, slice(at, at + len(sentences[0])))


@torch.no_grad()
def answered(task: Recall, method: Adore, plan: Plan) -> bool:
    """Whether the answer's bytes come out, the context being released before the question is known."""
    model = pocket()
    with saccade.attach(model, cache=method, plan=plan) as handle:
        c = model(task.ids[:, : task.context], logits_to_keep=1).past_key_values
        handle.compress()
        token = model(task.ids[:, task.context : task.asked], past_key_values=c, logits_to_keep=1).logits.argmax(-1)
        for wanted in task.ids[0, task.asked : -1].tolist():
            if int(token) != wanted:
                return False
            token = model(token, past_key_values=c).logits.argmax(-1)
            assert handle.stats().kept == [[method.size] * 2] * 8
    return True


class Planted(TokenController):
    """Says of the first token that it matters, and of a fact from its question on."""

    task: Recall

    def importance(self, z: Tensor, now: Tensor) -> Tensor:
        sigma = torch.zeros(z.shape[1])
        sigma[0] = 1
        # the question is known where there are more states, or the newest one is not among them
        if z.shape[1] > self.task.context or not torch.equal(now[0, 0], z[0, -1]):
            sigma[self.task.fact] = 1
        return sigma.expand(z.shape[0], now.shape[1], -1)


def test_a_question_that_comes_late_finds_what_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same controller, one that knows what the question is about: dropping for good fails, rebuilding succeeds."""
    model = pocket()
    empty = controller_plan(model, SMALL, new_controller(model, dim=8, hidden=8))
    monkeypatch.setattr(TokenController, "importance", Planted.importance)
    for seed in (100, 102):
        task = recall_task(Random(seed), 420)
        monkeypatch.setattr(TokenController, "task", task, raising=False)
        assert not answered(task, Adore(size=120, rebuild=0, recent=48), empty)
        assert answered(task, Adore(size=120, rebuild=64, recent=48), empty)


@pytest.mark.slow
def test_a_trained_controller_finds_what_queries_look_at() -> None:
    """After the recipe, the controller's K tokens hold more of what queries look at than the newest K, and than the K with the most
    attention so far."""
    method = Adore(size=128, rebuild=64, recent=32)
    rng, model, count = Random(0), pocket(), 96
    tasks = [recall_task(rng, 500) for _ in range(120)]
    found = train_token_controller(model, [(t.ids, t.answers) for t in tasks], steps=120, method=method, rate=4e-3, queries=8)
    made = TokenController.of(lambda name: found.tensor(0, name))
    shares = torch.zeros(3, dtype=torch.float64)
    for seed in range(500, 504):
        task = recall_task(Random(seed), 500)
        rows = torch.arange(task.asked - 4, task.ids.shape[1] - 1)
        judged = torch.arange(task.ids.shape[1]) <= (rows - method.recent).unsqueeze(1)
        every = attention_means(model, task.ids, torch.arange(task.ids.shape[1]))
        target = among_largest(every[:, rows], judged, count)
        with torch.no_grad():
            states = made.read(model.get_input_embeddings()(task.ids))
            learned = made.importance(states, states[:, rows])
        newest = torch.arange(task.ids.shape[1]).float().expand_as(learned)
        so_far = every.cumsum(1)[:, rows - 1]
        for i, scores in enumerate((learned, newest, so_far)):
            shares[i] += float((among_largest(scores, judged, count) & target).sum() / target.sum()) / 4
    assert shares[0] > shares[1] and shares[0] > shares[2], shares


# -- the controller -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_states_in_parts_are_those_at_once_and_pairs_are_a_perceptron() -> None:
    made, x = controller(), torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    whole = made.read(x)
    first = made.read(x[:, :5])
    assert error(torch.cat([first, made.read(x[:, 5:], first[:, -1])], 1), whole) < 1e-6
    assert error(made.read(3 * x), whole) < 1e-4, "whatever the size of the embeddings"
    got = made.importance(whole, whole[:, [3, 8]])
    for row, (t, at) in ((0, (0, 3)), (1, (1, 8))):
        for j in range(9):
            z, now = whole[row, j], whole[row, at]
            inner = made.past(z) + made.now(now) + made.both(z * now)
            assert abs(float(got[row, t, j] - made.last(torch.nn.functional.gelu(inner)))) < 1e-5


def samples(count: int) -> list[tuple[Tensor, Tensor]]:
    answers = torch.zeros(2, 80, dtype=torch.bool)
    answers[:, 60:79] = True
    return [(tokens(2, 80, seed=20 + i), answers) for i in range(count)]


def test_targets_are_the_largest_means_of_what_is_judged() -> None:
    ids, rows = tokens(2, 40), torch.tensor([20, 39])
    means = attention_means(llama(), ids, rows)
    before = llama().config._attn_implementation
    assert before is not None
    llama().set_attn_implementation("eager")
    exact = torch.stack(llama()(ids, output_attentions=True).attentions).mean((0, 2))
    llama().set_attn_implementation(before)
    assert error(means, exact[:, rows].float()) < 1e-6
    judged = torch.arange(40) <= (rows - 8).unsqueeze(1)
    target = among_largest(means, judged, 6)
    assert target.sum(-1).tolist() == [[6, 6], [6, 6]] and not bool(target[:, 0, 13:].any())
    assert float(means[target].min()) > 0
    assert torch.equal(means[0, 0, :13].topk(6).indices.sort().values, target[0, 0].nonzero().flatten())
    places = query_places(torch.zeros(1, 40, dtype=torch.bool).index_fill(1, torch.tensor([3, 30]), True), 8, 5, torch.Generator())
    assert int(places.min()) >= 8 and 30 in places and 3 not in places


def test_training_lowers_the_loss_and_leaves_the_model_alone() -> None:
    told: list[dict[str, Any]] = []
    model = llama()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    settings: dict[str, Any] = {"method": SMALL, "dim": 16, "hidden": 16, "rate": 2e-2, "queries": 16}
    found = train_token_controller(model, samples(25), steps=25, progress=told.append, **settings)
    first, last = (sum(step["loss"] for step in part) / 5 for part in (told[:5], told[-5:]))
    assert last < 0.98 * first, (first, last)
    assert sum(step["recall"] for step in told[-5:]) / 5 > 1.1 * sum(step["recall"] for step in told[:5]) / 5
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items()) and all(p.requires_grad for p in model.parameters())
    again, twin = (train_token_controller(model, samples(3), steps=3, **settings) for _ in range(2))
    assert all(torch.equal(x, twin.tensors[name]) for name, x in again.tensors.items())
    assert found.tensors.keys() == plan().tensors.keys() and found.slug == "adore"
    with saccade.attach(model, cache=SMALL, plan=found), torch.no_grad():
        assert greedy(model, tokens(1, 50), 3).shape == (1, 53)


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"), [({"size": 0}, "size=0. is not"), ({"rebuild": -1}, "rebuild=-1"), ({"recent": 0}, "recent=0")]
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adore(**fields)


@torch.no_grad()
def test_refuses_what_it_can_not_run_again() -> None:
    assert issubclass(Adore, Rebuilding)
    with pytest.raises(ValueError, match="without other cache policies"):
        saccade.attach(llama(), cache="adore|h2o", plan=plan())
    plain = llama()(tokens(1, 30)).past_key_values
    with saccade.attach(llama(), cache=SMALL, plan=plan()) as handle:
        with pytest.raises(ValueError, match="give input_ids instead of inputs_embeds"):
            llama()(inputs_embeds=llama().get_input_embeddings()(tokens(1, 30)))
        with pytest.raises(ValueError, match="has not read all tokens of this cache"):
            llama()(tokens(1, 2), past_key_values=plain)
        handle.mark_vision(torch.ones(1, 30, dtype=torch.bool))
        with pytest.raises(ValueError, match="which images don't have"):
            llama()(tokens(1, 30))


def test_refuses_to_train_what_it_can_not() -> None:
    with pytest.raises(ValueError, match="makes plans for adore, not for snapkv"):
        train_token_controller(llama(), [], steps=1, method="snapkv")
    with pytest.raises(ValueError, match="steps=0"):
        train_token_controller(llama(), [], steps=0)
    with pytest.raises(ValueError, match="give a size above recent"):
        train_token_controller(llama(), [], steps=1, method=Adore(size=32, recent=32))
    with pytest.raises(ValueError, match="of which adore always keeps 120"):
        train_token_controller(llama(), samples(1), steps=1, method=Adore(size=200, recent=120))


def test_spec_round_trip() -> None:
    assert build("adore(size=300, rebuild=0)").spec == "adore(size=300, rebuild=0)"
