"""The task mix: every scored answer follows from the text before it, and the stream depends on its seed alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from torch.utils.data import DataLoader

from saccade.train import drills, exams
from saccade.train.corpus import common_words, load_corpus
from saccade.train.data import TaskMix, pack
from saccade.train.pieces import ANSWER, COPIED, PLAIN, SCORED, Kind, Piece, size
from saccade.train.text import Grammar


def scored(pieces: list[Piece]) -> Iterator[tuple[str, str]]:
    """Each scored answer, and all the text before it."""
    before = ""
    for piece in pieces:
        text = piece.text.decode()
        if piece.weight >= SCORED:
            yield before, text
        before += text


def expected(before: str) -> str:
    """The answer to the question that the text ends with, worked out from the text."""
    if found := re.search(r"The ([a-z ]+) for (\S+) is $", before):
        return re.findall(rf"\nThe {found[1]} for {found[2]} is (.+)\.\n", before)[0]
    if found := re.search(r'd\["(.+)"\] == "$', before):
        return re.findall(rf'^"{found[1]}": "(.+)",$', before, re.M)[0]
    lines = dict(re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", before, re.M))
    found = re.search(r"VAR (\w+) hold\?\nAnswer: $|VAR (\w+) = VAR \w+\n$", before)
    assert found is not None
    name = found[1] or found[2]
    while name in lines:
        name = lines[name]
    return name


@pytest.mark.parametrize("make", [exams.needles, exams.dictionary, exams.variables])
@pytest.mark.parametrize("n", [400, 3000])
def test_exam_answers_follow_from_the_text(grammar: Grammar, make, n: int):
    for seed in range(20):
        pieces = make(grammar, Random(seed), n)
        answers = list(scored(pieces))
        assert answers and all(answer == expected(before) for before, answer in answers)
        assert 0.6 * n < size(pieces) < n + 200


@pytest.mark.parametrize("make", [drills.needles, drills.dictionary, drills.variables])
@pytest.mark.parametrize("n", [512, 4096])
def test_drill_answers_follow_from_the_text(grammar: Grammar, make, n: int):
    for seed in range(20):
        pieces = make(grammar, Random(seed), n)
        answers = list(scored(pieces))
        assert answers and all(answer.strip() == expected(before) for before, answer in answers)
    assert sum(len(list(scored(make(grammar, Random(seed), n)))) for seed in range(20)) > 20 * n / 500


@pytest.mark.parametrize("make", [exams.copy, drills.copy])
def test_copies_repeat_a_passage(grammar: Grammar, make):
    for seed in range(10):
        pieces = make(grammar, Random(seed), 2048)
        for i, piece in enumerate(pieces):
            if piece.weight == COPIED:
                passage = b"<<" + pieces[i - 1].text + piece.text + b">>\n"
                assert passage in b"".join(p.text for p in pieces[: i - 1])
        assert any(piece.weight == COPIED for piece in pieces)


def test_exam_matches_the_number_of_hops(grammar: Grammar):
    for hops in (1, 2, 3):
        text = b"".join(p.text for p in exams.variables(grammar, Random(hops), 1000, hops)).decode()
        assert text.count(" = VAR ") == hops * len(re.findall(r" = \d{5}\n", text))


def test_needle_depths(grammar: Grammar):
    for depth in (0.1, 0.5, 0.9):
        text = b"".join(p.text for p in exams.needles(grammar, Random(1), 4000, depths=[depth]))
        assert abs(re.search(rb"\nThe ", text).start() / len(text) - depth) < 0.05
    with pytest.raises(ValueError, match="2 depths were given for 1 needles"):
        exams.needles(grammar, Random(1), 4000, depths=[0.1, 0.2])


def test_pack_aligns_weights_with_bytes():
    problem = [Piece(b"ab", PLAIN), Piece(b"\xff", ANSWER, 2)]
    ids, weights, kinds = pack([(Kind.VARIABLES, problem)], 5)
    assert ids.tolist() == [1, 100, 101, 258, 0, 0] and ids.dtype == torch.int64
    assert weights.tolist() == [0, 1, 1, 6, 0, 0] and weights.dtype == torch.float32
    assert kinds.tolist() == [0, 4, 4, 4 + 16, 0, 0] and kinds.dtype == torch.uint8


def test_pack_keeps_the_end():
    ids, weights, _ = pack([(Kind.TEXT, [Piece(b"abcdef", PLAIN), Piece(b"gh", ANSWER)])], 4)
    assert ids.tolist() == [1, *(byte + 3 for byte in b"efgh")] and weights.tolist() == [0, 1, 1, 6, 6]


def test_stream_depends_on_the_seed_alone(grammar: Grammar):
    first = [TaskMix(grammar, 256, 4, seed=3).sample(i) for i in range(12)]
    again = list(islice(TaskMix(grammar, 256, 4, seed=3), 12))
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    other = TaskMix(grammar, 256, 4, seed=4).sample(0)
    assert not torch.equal(first[0][0], other[0])


def test_workers_ranks_and_restarts_give_the_same_batches(grammar: Grammar):
    whole = [batch[0] for batch in islice(DataLoader(TaskMix(grammar, 128, 4), 4), 4)]
    workers = [batch[0] for batch in islice(DataLoader(TaskMix(grammar, 128, 4), 4, num_workers=2), 4)]
    assert all(torch.equal(a, b) for a, b in zip(whole, workers, strict=True))
    ranks = [list(islice(DataLoader(TaskMix(grammar, 128, 2, rank=r, world=2), 2), 4)) for r in (0, 1)]
    assert all(torch.equal(whole[i], torch.cat([ranks[0][i][0], ranks[1][i][0]])) for i in range(4))
    later = next(iter(DataLoader(TaskMix(grammar, 128, 4, first=3), 4)))
    assert torch.equal(whole[3], later[0])


def test_split_sequences_hold_several_problems(grammar: Grammar):
    mix = TaskMix(grammar, 4096, 1, split_share=1.0)
    counts = [len(mix.problems(Random(seed))) for seed in range(10)]
    assert min(counts) >= 1 and max(counts) <= 5 and sum(counts) > 15


def test_bad_mix_is_refused(grammar: Grammar):
    with pytest.raises(ValueError, match="expected 5 weights"):
        TaskMix(grammar, 256, 1, mix=(1.0, 1.0))
    with pytest.raises(ValueError, match="at least 128"):
        TaskMix(grammar, 16, 1)


def test_corpus(sources: Path, tmp_path: Path):
    train, held_out = load_corpus(10, [sources])
    again, _ = load_corpus(10, [sources])
    assert train == again and len(train) > 10 * len(held_out) > 0
    assert not any(part in train for part in held_out.split(b"\n\n"))
    words = common_words(train)
    assert words == sorted(set(words)) and all(re.fullmatch("[a-z]{4,9}", word) for word in words)
    with pytest.raises(ValueError, match="too few"):
        load_corpus(10, [tmp_path])
