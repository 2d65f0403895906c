"""Stage 9: the n-gram is modified Kneser-Ney, by the definition counted anew and by KenLM's own file."""

import itertools
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from espnet_mega_plugin.recipe.lm_text import joined
from espnet_mega_plugin.recipe.ngram import BEGIN, END, UNKNOWN, estimate, write_arpa

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def text(seed: int, sentences: int, tokens: str = "abcdef") -> list[list[str]]:
    """Sentences of 0 to 9 tokens, the first letters more often than the last."""
    draw = random.Random(seed)
    weights = [1 / (i + 1) for i in range(len(tokens))]
    return [draw.choices(tokens, weights, k=draw.randint(0, 9)) for _ in range(sentences)]


class Oracle:
    """p(w | context) from the list of all n-grams, by counting anew for every number; nothing is shared with ngram.py."""

    def __init__(self, sentences, order):
        self.order = order
        self.lines = [[BEGIN, *sentence, END] for sentence in sentences]
        self.vocabulary = {word for line in self.lines for word in line[1:]} | {UNKNOWN, END}

    def occurring(self, n):
        return [tuple(line[i : i + n]) for line in self.lines for i in range(len(line) - n + 1)]

    def adjusted(self, n):
        grams = [gram for gram in self.occurring(n) if gram != (BEGIN,)]
        longer = set(self.occurring(n + 1))
        return {
            gram: grams.count(gram)
            if n == self.order or gram[0] == BEGIN
            else len({other[0] for other in longer if other[1:] == gram})
            for gram in set(grams)
        }

    def discount(self, n, a):
        values = list(self.adjusted(n).values())
        t1, t2, t3, t4 = (values.count(k) for k in (1, 2, 3, 4))
        if 0 in (t1, t2, t3):
            return {1: 0.5, 2: 1.0}.get(a, 1.5)
        y = t1 / (t1 + 2 * t2)
        amounts = {1: 1 - 2 * y * t2 / t1, 2: 2 - 3 * y * t3 / t2, 3: 3 - 4 * y * t4 / t3}
        if any(not 0 <= amounts[k] <= k for k in amounts):
            return {1: 0.5, 2: 1.0}.get(a, 1.5)
        return amounts[min(a, 3)]

    def probability(self, word, context):
        n = len(context) + 1
        following = {gram[-1]: a for gram, a in self.adjusted(n).items() if gram[:-1] == context}
        lower = self.probability(word, context[1:]) if context else 1 / len(self.vocabulary)
        if not following:
            return lower
        total = sum(following.values())
        rest = sum(self.discount(n, a) for a in following.values()) / total
        a = following.get(word, 0)
        return (a - self.discount(n, a) if a else 0.0) / total + rest * lower


def read_arpa(path) -> tuple[dict, dict]:
    """Log-probabilities and back-off weights of an ARPA file, by n-gram; checks the counts of its head."""
    content = path.read_text(encoding="utf-8")
    logs, backoffs = {}, {}
    heads = {int(n): int(count) for n, count in re.findall(r"^ngram (\d+)=(\d+)$", content, re.M)}
    for n in heads:
        section = re.search(rf"^\\{n}-grams:\n(.*?)\n\n", content, re.M | re.S).group(1).split("\n")
        assert len(section) == heads[n]
        for line in section:
            log, gram, *backoff = line.split("\t")
            gram = tuple(gram.split(" "))
            assert len(gram) == n
            logs[gram] = float(log)
            if backoff:
                backoffs[gram] = float(backoff[0])
    assert content.startswith("\\data\\\n") and content.endswith("\n\\end\\\n")
    return logs, backoffs


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_arpa_file_is_the_definition(tmp_path, seed, order):
    sentences = text(seed, 40, "abcd")
    write_arpa(estimate(sentences, order), tmp_path / "x.arpa")
    logs, backoffs = read_arpa(tmp_path / "x.arpa")
    oracle = Oracle(sentences, order)

    def probability(word, context):  # as any reader of such a file has it
        if (*context, word) in logs:
            return 10 ** logs[(*context, word)]
        return 10 ** backoffs.get(context, 0.0) * probability(word, context[1:])

    contexts = [(), *(gram for gram in logs if len(gram) < order and END not in gram and UNKNOWN not in gram)]
    for context in random.Random(seed).sample(contexts, min(12, len(contexts))):
        for word in oracle.vocabulary:
            got, want = probability(word, context), oracle.probability(word, context)
            assert got == pytest.approx(want, rel=1e-5), (word, context)


def test_kenlm_gives_the_same_file(tmp_path):
    """Every n-gram and every weight of KenLM's lmplz, to the digits it prints (tests/golden/README.md)."""
    sentences = [line.split() for line in (GOLDEN / "lmplz_text.txt").read_text().splitlines()]
    write_arpa(estimate(sentences, 3), tmp_path / "x.arpa")
    (logs, backoffs), (their_logs, their_backoffs) = (
        read_arpa(p) for p in (tmp_path / "x.arpa", GOLDEN / "lmplz_3gram.arpa")
    )
    assert logs.pop((BEGIN,)) == -99 and their_logs.pop((BEGIN,)) == 0  # nothing predicts it; both are in use
    assert logs == pytest.approx(their_logs, abs=1e-6)
    assert backoffs == pytest.approx(their_backoffs, abs=1e-6)


@pytest.mark.parametrize(("sentences", "order"), [(400, 3), (30, 4), (3, 3), (1, 2)])
def test_every_context_gives_a_distribution(seed, sentences, order):
    model = estimate([*text(seed, sentences), ["a"]], order)
    vocabulary = [gram[0] for gram in model.logs[0] if gram != (BEGIN,)]
    tokens = [BEGIN, *(w for w in vocabulary if w != END)]
    for context in itertools.product(tokens, repeat=min(2, order - 1)):
        if BEGIN not in context[1:]:
            assert sum(10 ** model.log10(w, context) for w in vocabulary) == pytest.approx(1, abs=1e-9), context


def test_discounts_of_a_text_that_is_large_enough(seed):
    """Chen and Goodman's formulas on the counts of counts."""
    sentences = text(seed, 400, "abcdefghijklmnopqrstuvwxyz")
    model = estimate(sentences, 2)
    counts: dict = {}
    for sentence in sentences:
        for pair in itertools.pairwise([BEGIN, *sentence, END]):
            counts[pair] = counts.get(pair, 0) + 1
    t = [sum(count == k for count in counts.values()) for k in range(5)]
    y = t[1] / (t[1] + 2 * t[2])
    assert 2 not in model.fallback
    assert model.discounts[1] == pytest.approx(
        [1 - 2 * y * t[2] / t[1], 2 - 3 * y * t[3] / t[2], 3 - 4 * y * t[4] / t[3]]
    )


def test_perplexity_is_that_of_the_probabilities(seed):
    model = estimate(text(seed, 50), 3)
    sentences = [["a", "b", "zz"], []]
    logs = [
        model.log10("a", [BEGIN]), model.log10("b", [BEGIN, "a"]), model.log10("zz", ["a", "b"]),
        model.log10(END, ["b", "zz"]), model.log10(END, [BEGIN]),
    ]  # fmt: skip
    figure, count, unknown = model.perplexity(sentences)
    assert (count, unknown) == (5, 1) and figure == pytest.approx(10 ** (-math.fsum(logs) / 5))


def test_longer_contexts_know_a_pattern_better():
    sentences = [list("abcabcabc"), list("bcabcabca"), list("cabcab")] * 5
    perplexities = [estimate(sentences, order).perplexity(sentences)[0] for order in (1, 2, 3)]
    assert perplexities[0] > 1.5 * perplexities[1] > perplexities[2]


@pytest.mark.parametrize(
    ("sentences", "order", "message"),
    [
        ([], 2, "the text is empty"),
        ([["a"]], 0, "--ngram_num 0: expected 1 or more"),
        ([["a", "<s>"]], 2, "'<s>' cannot be a token"),
        ([["a b"]], 2, "'a b' cannot be a token"),
    ],
)
def test_refusals(sentences, order, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        estimate(sentences, order)


def test_texts_are_joined_with_keys_of_their_own(tmp_path):
    (tmp_path / "a").write_text("u1 one two\nu2\nu3 three\n")
    (tmp_path / "b").write_text("u1 four\nu4 five\n")
    assert joined([tmp_path / "a", tmp_path / "b"]) == {"u1": "one two", "u3": "three", "u1-2": "four", "u4": "five"}
    (tmp_path / "c").write_text("u1\n")
    with pytest.raises(ValueError, match="no words in"):
        joined([tmp_path / "c"])


def test_command_counts_words_or_tokens(tmp_path):
    (tmp_path / "text").write_text("u1 one two\nu2 two\n")
    for units, known in (("word", {"one", "two"}), ("token", set("onetw") | {"<space>"})):
        call = [sys.executable, "-m", "espnet_mega_plugin.recipe.ngram", "--order", "2", "--units", units]
        files = ["--text", tmp_path / "text", "--test_text", tmp_path / "text", "--output", tmp_path / "2gram.arpa"]
        said = subprocess.run(
            [*call, "--token_type", "char", *files], capture_output=True, text=True, check=True
        ).stdout
        assert f"perplexity of {tmp_path / 'text'}: " in said and f" {units}s and ends, 0 unknown)" in said
        tokens = {gram[0] for gram in read_arpa(tmp_path / "2gram.arpa")[0] if len(gram) == 1} - {BEGIN, END, UNKNOWN}
        assert tokens == known
