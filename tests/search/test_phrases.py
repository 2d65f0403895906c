"""Phrase boosting against counting phrases in the label sequence."""

import random

import plain
import pytest
import torch
from every_prefix import every_prefix, finals
from random_tree import RandomTree
from search_problems import SEARCH_TYPES, assert_same_nbest, random_lengths, random_options, tabled_problem

from espnet_mega_plugin.search.phrases import PhraseScorer, read_phrases
from espnet_mega_plugin.search.scorer import Fusion


def merged(phrases) -> dict[tuple[int, ...], float]:
    weights = {}
    for labels, weight in phrases:
        weights[tuple(labels)] = weights.get(tuple(labels), 0.0) + weight
    return weights


def complete(phrases, prefix: tuple[int, ...]) -> float:
    """weight * labels * places of each phrase."""
    return sum(
        weight * len(phrase) * sum(prefix[i : i + len(phrase)] == phrase for i in range(len(prefix)))
        for phrase, weight in merged(phrases).items()
    )


def on_loan(phrases, prefix: tuple[int, ...]) -> float:
    """The largest weight * labels matched of phrases that begin with an end of the prefix."""
    return max(
        (
            weight * n
            for phrase, weight in merged(phrases).items()
            for n in range(len(phrase))
            if n <= len(prefix) and prefix[len(prefix) - n :] == phrase[:n]
        ),
        default=0.0,
    )


def random_phrases(V: int, count: int, lengths=(1, 4), least: float = 0.1):
    def some():
        return random.choices(range(1, V), k=random.randint(*lengths))

    return [(some(), random.uniform(least, 2.0)) for _ in range(count)]


@pytest.mark.parametrize("least", [0.1, -1.0])
def test_every_sequence_gets_its_phrases_and_its_loan(least):
    for count in (0, 1, 2, 5, 12):
        phrases = random_phrases(4, count, least=least)
        scorer = PhraseScorer(phrases, 4, dtype=torch.float64)
        found = every_prefix(scorer, 4, 5)
        assert len(found) == sum(3**n for n in range(6))
        for prefix, (scores, final) in found.items():
            running = sum(float(found[prefix[:i]][0][label]) for i, label in enumerate(prefix))
            want = complete(phrases, prefix)
            assert running == pytest.approx(want + on_loan(phrases, prefix), abs=1e-12), (phrases, prefix)
            assert running + float(final) == pytest.approx(want, abs=1e-12), (phrases, prefix)
            assert scores[0] == 0
        # phrases have four labels at most, so every arc of the trie was passed
        reached = max(float(scores.max()) for scores, _ in found.values())
        assert scorer.largest == pytest.approx(reached, abs=1e-12)


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_wherever_prefixes_branch_and_places_move(seed, fixed_shapes):
    for V, count in ((3, 4), (4, 10), (6, 60)):
        phrases = random_phrases(V, count, lengths=(1, 6))
        grown = RandomTree(PhraseScorer(phrases, V, dtype=torch.float64), V, seed, fixed_shapes)

        def running(prefix, phrases=phrases):
            return complete(phrases, prefix) + on_loan(phrases, prefix)

        for prefix, scores in grown.grow_large(40):
            want = [0.0] + [running((*prefix, label)) - running(prefix) for label in range(1, V)]
            assert scores.tolist() == pytest.approx(want, abs=1e-12), (phrases, prefix)
            for kept, end in finals(grown) if random.random() < 0.2 else ():
                assert float(end) == pytest.approx(-on_loan(phrases, kept), abs=1e-12), (phrases, kept)


@pytest.mark.parametrize("search_type", SEARCH_TYPES)
def test_a_search_finds_what_the_plain_one_finds_with_them(search_type):
    for _ in range(5):
        problem = tabled_problem(random_lengths(3, longest=7))
        options = random_options(search_type, problem.V)
        phrases = random_phrases(problem.V, 4, lengths=(2, 3))

        def bonus(prefix, phrases=phrases, V=problem.V):
            longer = [(*prefix, label) for label in range(1, V)]
            before, *after = (complete(phrases, one) + on_loan(phrases, one) for one in (prefix, *longer))
            return [0.0] + [0.7 * (running - before) for running in after]

        def final(prefix, phrases=phrases):
            return -0.7 * on_loan(phrases, prefix)

        scorer = PhraseScorer(phrases, problem.V, dtype=torch.float64)
        lists = problem.found(options, fusion=Fusion(scorer, 0.7))
        for nbest, T, log_probs in zip(lists, problem.lengths, problem.log_probs, strict=True):
            assert_same_nbest(nbest, plain.search(log_probs, T, options, bonus, final))


A, B, C, D = 1, 2, 3, 4


@pytest.mark.parametrize(
    "phrases, labels, scores, final",
    [
        ([([A, B, C], 1.5)], (A, B, C), [1.5, 1.5, 1.5], 0),
        ([([A, B, C], 1.5)], (A, B, D), [1.5, 1.5, -3.0], 0),
        ([([A, B, C], 1.5)], (A, A, B), [1.5, 0, 1.5], -3),
        ([([A, B, C], 1.0), ([B, D], 1.0)], (A, B, D), [1, 1, 0], 0),
        ([([A, B], 1.0), ([B, A], 1.0)], (A, B, A), [1, 2, 2], -1),
        ([([A, B, C], 1.0), ([B, C], 1.0)], (A, B, C), [1, 1, 3], 0),
        ([([A, A], 1.0)], (A, A, A), [1, 2, 2], -1),
        ([([A, B], 1.0), ([A, B], 0.5)], (A, B), [1.5, 1.5], 0),
        ([([A, B], -1.0)], (A, B), [0, -2], 0),
    ],
)
def test_small_cases(phrases, labels, scores, final):
    found = every_prefix(PhraseScorer(phrases, 5), 5, 3)
    assert [float(found[labels[:i]][0][label]) for i, label in enumerate(labels)] == scores
    assert float(found[labels][1]) == final


@pytest.mark.parametrize("phrases", [[], [([1, 2], 0.0), ([2], 0)]])
def test_no_phrase_or_no_weight_is_off_to_the_bit(phrases):
    scorer = PhraseScorer(phrases, 3)
    assert scorer.largest == 0.0
    for scores, final in every_prefix(scorer, 3, 3).values():
        assert scores.equal(torch.zeros(3)) and final.equal(torch.zeros(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_score_is_above_the_largest_in_any_precision(dtype):
    scorer = PhraseScorer(random_phrases(4, 12), 4, dtype=dtype)
    for scores, _ in every_prefix(scorer, 4, 5).values():
        assert scores.dtype == dtype and float(scores.max()) <= scorer.largest


@pytest.mark.parametrize(
    "phrase, message",
    [
        (([], 1.0), r"phrases\[1\] has the labels \[\]; expected at least one, each from 1 to 4"),
        (([1, 0], 1.0), r"phrases\[1\] has the labels \[1, 0\]"),
        (([5], 1.0), r"phrases\[1\] has the labels \[5\]"),
        (([1], "much"), r"phrases\[1\] has the weight 'much'; expected a finite number"),
        (([1], float("nan")), r"phrases\[1\] has the weight nan"),
        (([1], 1e39), r"phrases: the weights add up to more than torch\.float32 holds; take smaller ones"),
    ],
)
def test_what_is_no_phrase_is_refused(phrase, message):
    with pytest.raises(ValueError, match=message):
        PhraseScorer([([1], 1.0), phrase], 5)


# --- files ----------------------------------------------------------------------------------------------------------


def letters(text: str) -> list[int]:
    """<blank> <unk> a b c ..."""
    return [ord(letter) - ord("a") + 2 if letter.isalpha() else 1 for letter in text]


def test_a_list_of_phrases(tmp_path):
    path = tmp_path / "phrases"
    path.write_bytes("\ufeffab\t2.5\r\n\n  \nc\nba \t -1e-1\n".encode())
    assert read_phrases(path, letters, unknown=1) == [([2, 3], 2.5), ([4], 1.0), ([3, 2], -0.1)]
    assert read_phrases(path, letters, weight=0.5)[1] == ([4], 0.5)


@pytest.mark.parametrize(
    "line, message",
    [
        ("ab\tmuch", "behind the tab stands 'much'; expected the phrase's weight, a finite number"),
        ("ab\t", "behind the tab stands ''"),
        ("ab\tinf", "behind the tab stands 'inf'"),
        ("ab\t1\t2", r"behind the tab stands '1\\t2'"),
        ("\t2", "'' has no tokens; expected a phrase"),
        ("ab\t-1e39", r"a weight of -1e\+39 for 2 labels is more than float32 holds\."),
        ("ab\t2e38", r"a weight of 2e\+38 for 2 labels is more than float32 holds\."),
        ("a7b", r"'a7b' has something the model has no token for \(label 1 at place 2 of 3\)"),
    ],
)
def test_a_faulty_line_is_refused_with_its_number(tmp_path, line, message):
    path = tmp_path / "list.txt"
    path.write_text(f"ab\n{line}\n")
    with pytest.raises(ValueError, match=rf"list\.txt:2: {message}"):
        read_phrases(path, letters, unknown=1)


def test_a_list_that_is_not_text_or_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no such file; expected phrases"):
        read_phrases(tmp_path / "nothing", letters)
    path = tmp_path / "latin"
    path.write_bytes(b"\xe9\n")
    with pytest.raises(ValueError, match="latin: not UTF-8"):
        read_phrases(path, letters)
