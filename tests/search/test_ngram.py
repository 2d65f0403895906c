"""n-gram models against ARPA's definition, against two libraries that read such files, and what faulty files get."""

import gzip
import math
import random

import plain
import pytest
import torch
from every_prefix import every_prefix, finals
from random_tree import RandomTree
from search_problems import SEARCH_TYPES, assert_same_nbest, random_lengths, random_options, tabled_problem

from espnet_mega_plugin.search.ngram import NgramScorer, read_arpa
from espnet_mega_plugin.search.scorer import Fusion

TOKENS = ["<blank>", "a", "b", "c", "▁d"]


class Model:
    """An n-gram model as a dictionary: log10 probability and backoff weight of each n-gram."""

    def __init__(self, order: int, entries: dict[tuple[str, ...], tuple[float, float | None]]):
        self.order, self.entries = order, entries

    def write(self, path):
        lines = ["", "\\data\\"]
        sections = [[n for n in self.entries if len(n) == order] for order in range(1, self.order + 1)]
        lines += [f"ngram {order}={len(section)}" for order, section in enumerate(sections, 1)]
        for order, section in enumerate(sections, 1):
            lines += ["", f"\\{order}-grams:"]
            for ngram in section:
                logp, backoff = self.entries[ngram]
                lines.append(f"{logp}\t{' '.join(ngram)}" + ("" if backoff is None else f"\t{backoff}"))
        path.write_text("\n".join([*lines, "", "\\end\\", ""]), encoding="utf-8")
        return path

    def log10(self, context: tuple[str, ...], word: str) -> float:
        """The definition: the n-gram's own probability or, where there is none, that of a shorter context."""
        if (*context, word) in self.entries:
            return self.entries[(*context, word)][0]
        if not context:
            return -100.0
        return (self.entries.get(context, (0, None))[1] or 0.0) + self.log10(context[1:], word)

    def logp(self, prefix: tuple[int, ...], word: str) -> float:
        """Of a word behind these labels; above 0 counts as 0."""
        words = [("<s>" if ("<s>",) in self.entries else "no such word"), *(TOKENS[label] for label in prefix), word]
        *context, word = [w if (w,) in self.entries or w == "no such word" else "<unk>" for w in words]
        context = tuple(context[max(0, len(context) - self.order + 1) :])
        return min(0.0, self.log10(context, word) * math.log(10))


def random_model(order: int, words: list[str], ngrams: int = 25) -> Model:
    """Any n-grams, also such whose beginnings or ends are not there."""
    entries = {(word,): (0.0, None) for word in words}
    inner = [word for word in words if word not in ("<s>", "</s>")]
    for n in range(2, order + 1):
        for _ in range(ngrams):
            first = random.choice([word for word in words if word != "</s>"])
            last = random.choice([word for word in words if word != "<s>"])
            entries[(first, *random.choices(inner, k=n - 2), last)] = (0.0, None)
    for ngram in entries:
        backoff = round(random.uniform(-1.0, 0.2), 5) if len(ngram) < order and random.random() < 0.7 else None
        entries[ngram] = (round(random.uniform(-3.0, -0.1), 5), backoff)
    return Model(order, entries)


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_as_defined_wherever_prefixes_branch_and_places_move(tmp_path, seed, order, fixed_shapes):
    for without in ([], ["<unk>"], ["<s>"], ["<unk>", "<s>"]):
        words = [word for word in ("<unk>", "<s>", "</s>", "a", "b", "▁d", "stranger") if word not in without]
        model = random_model(order, words)
        arpa = read_arpa(model.write(tmp_path / "lm.arpa"))
        scorer = NgramScorer(arpa, TOKENS, dtype=torch.float64, score_end=not without)
        assert scorer.unknown_tokens == ["c"]
        grown = RandomTree(scorer, len(TOKENS), seed, fixed_shapes)
        for prefix, scores in grown.grow_large(40):
            want = [0.0] + [model.logp(prefix, token) for token in TOKENS[1:]]
            assert scores.tolist() == pytest.approx(want, rel=1e-12), prefix
            for kept, end in finals(grown) if random.random() < 0.2 else ():
                assert float(end) == pytest.approx(0.0 if without else model.logp(kept, "</s>"), rel=1e-12), kept


@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_sequence_of_labels_has_the_probability_defined(tmp_path, order):
    model = random_model(order, ["<s>", "</s>", "a", "b", "c", "▁d"])
    scorer = NgramScorer(read_arpa(model.write(tmp_path / "lm")), TOKENS, dtype=torch.float64, score_end=True)
    found = every_prefix(scorer, len(TOKENS), 3)
    assert len(found) == 1 + 4 + 4**2 + 4**3
    for prefix, (_, end) in found.items():
        got = sum(found[prefix[:i]][0][label] for i, label in enumerate(prefix)) + end
        want = sum(model.logp(prefix[:i], TOKENS[label]) for i, label in enumerate(prefix)) + model.logp(prefix, "</s>")
        assert float(got) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("search_type", SEARCH_TYPES)
def test_a_search_finds_what_the_plain_one_finds_with_it(tmp_path, search_type):
    for _ in range(5):
        model = random_model(3, ["<s>", "</s>", "a", "b", "c", "▁d"])
        problem = tabled_problem(random_lengths(3, longest=7), V=len(TOKENS))
        options = random_options(search_type, problem.V)
        arpa = read_arpa(model.write(tmp_path / "lm"))
        scorer = NgramScorer(arpa, TOKENS, dtype=torch.float64, score_end=True)

        def bonus(prefix, model=model):
            return [0.0] + [0.3 * model.logp(prefix, token) for token in TOKENS[1:]]

        def final(prefix, model=model):
            return 0.3 * model.logp(prefix, "</s>")

        lists = problem.found(options, fusion=Fusion(scorer, 0.3))
        for nbest, T, log_probs in zip(lists, problem.lengths, problem.log_probs, strict=True):
            assert_same_nbest(nbest, plain.search(log_probs, T, options, bonus, final))


def test_as_kenlm(tmp_path):
    """Its numbers are float32 and log10. A token it does not know is its <unk>, as here."""
    kenlm = pytest.importorskip("kenlm")
    path, tokens = corpus_model(["<unk>", "<s>", "</s>", "a", "b", "▁d"]).write(tmp_path / "lm.arpa"), TOKENS
    lm = kenlm.Model(str(path))
    scorer = NgramScorer(read_arpa(path), tokens, dtype=torch.float64, score_end=True)
    for prefix, (scores, end) in every_prefix(scorer, len(tokens), 3).items():
        state, after = kenlm.State(), kenlm.State()
        lm.BeginSentenceWrite(state)
        for label in prefix:
            lm.BaseScore(state, tokens[label], after)
            state, after = after, state
        want = [lm.BaseScore(state, word, after) * math.log(10) for word in (*tokens[1:], "</s>")]
        got = [*scores[1:].tolist(), float(end)]
        assert got == pytest.approx(want, abs=1e-5), prefix


def test_as_the_arpa_library(tmp_path):
    arpa = pytest.importorskip("arpa")
    path = random_model(3, ["<unk>", "<s>", "</s>", "a", "b", "▁d"]).write(tmp_path / "lm.arpa")
    lm = arpa.loadf(str(path), encoding="utf-8")[0]
    for prefix, (scores, _) in every_prefix(NgramScorer(read_arpa(path), TOKENS, torch.float64), 5, 3).items():
        context = ("<s>", *(TOKENS[label] for label in prefix))[-2:]
        want = [min(0.0, lm.log_p((*context, token)) * math.log(10)) for token in TOKENS[1:]]
        assert scores[1:].tolist() == pytest.approx(want, rel=1e-12), prefix


def corpus_model(words: list[str]) -> Model:
    """A trigram model that has the beginning and the end of each of its n-grams, as KenLM asks for."""
    inner = [word for word in words if word not in ("<s>", "</s>")]
    ngrams = {(word,) for word in words}
    for _ in range(12):
        sentence = ("<s>", *random.choices(inner, k=random.randint(0, 4)), "</s>")
        ngrams |= {sentence[i : i + n] for n in (2, 3) for i in range(len(sentence) - n + 1)}

    def numbers(ngram):
        return (round(random.uniform(-3, -0.5), 4), None if len(ngram) == 3 else round(random.uniform(-0.5, 0), 4))

    return Model(3, {ngram: numbers(ngram) for ngram in sorted(ngrams, key=lambda ngram: (len(ngram), ngram))})


def test_more_probable_than_certain_counts_as_certain(tmp_path):
    model = Model(2, {("a",): (-0.1, 3.0), ("b",): (-0.2, None), ("a", "a"): (-0.5, None)})
    scorer = NgramScorer(read_arpa(model.write(tmp_path / "lm")), TOKENS[:3])
    scores = every_prefix(scorer, 3, 1)[(1,)][0]
    torch.testing.assert_close(scores, torch.tensor([0.0, -0.5 * math.log(10), 0.0]))
    assert scorer.largest == 0.0


def test_precision_is_the_one_asked_for(tmp_path):
    path = random_model(3, ["<s>", "a", "b"]).write(tmp_path / "lm")
    exact, single, half = (
        NgramScorer(read_arpa(path), TOKENS, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    exact, single, half = (every_prefix(scorer, 5, 2) for scorer in (exact, single, half))
    for prefix in exact:
        assert single[prefix][0].dtype == torch.float32 and half[prefix][0].dtype == torch.bfloat16
        torch.testing.assert_close(single[prefix][0].double(), exact[prefix][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(half[prefix][0].double(), exact[prefix][0], rtol=2e-2, atol=2e-2)


def test_tokens_without_a_probability_get_the_floor(tmp_path):
    arpa = read_arpa(Model(1, {("a",): (-1.0, None)}).write(tmp_path / "lm"))
    usual, own = (every_prefix(NgramScorer(arpa, TOKENS[:3], **more), 3, 0) for more in ({}, {"floor": -7.0}))
    assert usual[()][0].tolist() == pytest.approx([0, -math.log(10), -100 * math.log(10)])
    assert own[()][0].tolist() == pytest.approx([0, -math.log(10), -7])
    with pytest.raises(ValueError, match="floor is a log-probability, at most 0; got 1.0"):
        NgramScorer(arpa, TOKENS, floor=1.0)


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_compressed_file_is_the_plain_one(tmp_path):
    plain = random_model(3, ["<s>", "</s>", "a", "b"]).write(tmp_path / "lm.arpa")
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    one, other = read_arpa(plain), read_arpa(packed)
    assert one.words == other.words
    for name in ("ngrams", "logp", "backoff"):
        for left, right in zip(getattr(one, name), getattr(other, name), strict=True):
            assert left.equal(right)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"packed: behind line \d+ it cannot be unpacked"):
        read_arpa(packed)


GOOD = "\\data\\\nngram 1=2\nngram 2=1\n\n\\1-grams:\n-1\ta\t-0.5\n-2 b\n\n\\2-grams:\n-0.3\ta b\n\n\\end\\\nanything"


def test_the_file_the_faults_are_made_of_is_good(tmp_path):
    path = tmp_path / "lm"
    path.write_text("a comment, as SRILM's tools leave one\n" + GOOD)
    arpa = read_arpa(path)
    assert arpa.words == ["a", "b"] and [ngrams.tolist() for ngrams in arpa.ngrams] == [[[0], [1]], [[0, 1]]]
    assert [(10 ** (logp / math.log(10))).tolist() for logp in arpa.logp] == [
        [pytest.approx(0.1), pytest.approx(0.01)],
        [pytest.approx(10**-0.3)],
    ]
    assert arpa.backoff[0].tolist() == [pytest.approx(-0.5 * math.log(10)), 0] and arpa.backoff[1].tolist() == [0]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("\\data\\", "data", r":13: there is no line \\data\\"),
        ("ngram 1=2\n", "", r":2: expected `ngram 1=` and how many there are, got 'ngram 2=1'"),
        ("ngram 2=1", "ngram 2=many", r":3: expected `ngram 2=`"),
        ("ngram 1=2\nngram 2=1\n", "", r":3: \\data\\ announces nothing"),
        ("ngram 1=2", "ngram 1=3", r":9: \\1-grams: ends after 2 n-grams; \\data\\ announces 3"),
        ("ngram 2=1", "ngram 2=0", r":12: \\2-grams: ends after 1 n-grams; \\data\\ announces 0"),
        ("\\1-grams:", "\\2-grams:", r":5: expected \\1-grams:, got '\\\\2-grams:'"),
        ("\\2-grams:", "\\3-grams:", r":9: expected \\2-grams:"),
        ("\\end\\", "\\3-grams:", r":12: expected \\end\\"),
        ("\\end\\\nanything", "", r":11: the file ends without \\end\\; is it whole"),
        (
            "\n\n\\1-grams:\n-1\ta\t-0.5\n-2 b\n\n\\2-grams:\n-0.3\ta b\n\n\\end\\\nanything",
            "",
            r":3: the file ends behind",
        ),
        ("-2 b", "b", r":7: expected a log10 probability, 1 word and, if it has one, a backoff weight, got 'b'"),
        ("-2 b", "-2 b b b", r":7: expected a log10 probability, 1 word and"),
        ("-0.3\ta b", "-0.3\ta b\t-0.1", r":10: expected a log10 probability, 2 words, got"),
        ("-0.3\ta b", "-0.3\ta x", r":10: 'x' is not among the 1-grams"),
        ("-2 b", "-2 a", r":7: 'a' is there a second time"),
        ("-2 b", "two b", r":7: 'two' is not a finite number"),
        ("-2 b", "-inf b", r":7: '-inf' is not a finite number \(a probability of zero is written -99\)"),
        ("-2 b", "0.5 b", r":7: log10 probability '0.5' is above 0"),
        ("\t-0.5", "\tnan", r":6: 'nan' is not a finite number"),
    ],
)
def test_a_faulty_file_is_refused_with_its_line(tmp_path, old, new, message):
    path = tmp_path / "faulty.arpa"
    assert GOOD.count(old) == 1
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=r"faulty\.arpa" + message):
        read_arpa(path)


def test_a_word_that_is_not_utf8_and_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "latin.arpa"
    path.write_bytes(GOOD.replace("b", "\xe9").encode("latin1"))
    with pytest.raises(ValueError, match=r"latin\.arpa:7: b'\\xe9' is not UTF-8"):
        read_arpa(path)
    with pytest.raises(FileNotFoundError, match="nothing: no such file; expected an n-gram model in ARPA form"):
        read_arpa(tmp_path / "nothing")


def test_a_model_of_other_tokens_or_without_an_end_is_refused(tmp_path):
    arpa = read_arpa(Model(1, {("<s>",): (-99, None), ("hello",): (-1.0, None)}).write(tmp_path / "words.arpa"))
    with pytest.raises(ValueError, match=r"words\.arpa: none of its 2 words .*'hello'.* is in the token list .*'a'"):
        NgramScorer(arpa, ["<blank>", "<s>", "a"])
    with pytest.raises(ValueError, match=r"words\.arpa: it has no </s>, which score_end asks for"):
        NgramScorer(arpa, ["<blank>", "hello"], score_end=True)
