"""Stage 9: an n-gram language model of the training text, by interpolated modified Kneser-Ney, as an ARPA file.

No wheel has an estimator that writes ARPA, and KenLM's `lmplz`, which ESPnet's recipes call, must be compiled. This one
is plain Python with every n-gram in memory, some 300 bytes each: for transcripts (millions of tokens), not for the web.

Letters: w a token, c a context of n - 1 tokens, N the order, V the tokens with `</s>` and `<unk>`, without `<s>`.

    a(c w)    how often c w occurs where n = N or c begins with <s>, else how many different tokens stand before c w
    t(n, k)   how many n-grams have a = k
    D(n, k)   discounts: k - (k + 1) t(n, k+1) / t(n, k) * t(n, 1) / (t(n, 1) + 2 t(n, 2)) for k = 1, 2, 3;
              3 is for all larger a. Where a text is too small for them: 0.5, 1, 1.5, as KenLM's --discount_fallback
    b(c)      sum over w of D(n, a(c w)) / sum over w of a(c w)
    p(w | c)  (a(c w) - D(n, a(c w))) / sum over w of a(c w) + b(c) p(w | c without its first token)
    p(w)      the same with 1 / |V| in the place of the shorter context's probability

Source: Chen and Goodman 1998, "An empirical study of smoothing techniques for language modeling", TR-10-98, section 3;
the handling of <s>, <unk> and small texts as in Heafield et al. 2013, "Scalable modified Kneser-Ney".
"""

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from espnet_mega_plugin.recipe.kaldi_dir import read_table
from espnet_mega_plugin.recipe.score import splitters, text_cleaner

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
FALLBACK = (0.5, 1.0, 1.5)
NEVER = -99.0  # log10 of the probability of <s>, which nothing predicts; SRILM's number
UNITS = ("token", "word")

Gram = tuple[str, ...]


@dataclass(frozen=True)
class Ngram:
    """logs: of order n, at n - 1: n-gram -> log10 p of its last token after the others. backoffs: context -> log10 b.

    discounts: of each order, the three that were used. fallback: orders that were too small for discounts of their own.
    """

    logs: Sequence[dict[Gram, float]]
    backoffs: dict[Gram, float]
    discounts: Sequence[Sequence[float]]
    fallback: Sequence[int]

    @property
    def order(self) -> int:
        return len(self.logs)

    def log10(self, token: str, context: Sequence[str]) -> float:
        """log10 p(token | context), as every reader of an ARPA file computes it; an unknown token counts as <unk>."""
        gram = (*context, token)[-self.order :]
        known = self.logs[0]
        gram = tuple(word if (word,) in known else UNKNOWN for word in gram)
        backoff = 0.0
        while gram not in self.logs[len(gram) - 1]:
            backoff += self.backoffs.get(gram[:-1], 0.0)
            gram = gram[1:]
        return backoff + self.logs[len(gram) - 1][gram]

    def perplexity(self, sentences: Iterable[Sequence[str]]) -> tuple[float, int, int]:
        """Of the tokens and sentence ends: perplexity, how many, and how many of them were unknown (counted in)."""
        total, count, unknown = 0.0, 0, 0
        for sentence in sentences:
            words = [BEGIN, *sentence, END]
            for i in range(1, len(words)):
                total += self.log10(words[i], words[max(0, i - self.order + 1) : i])
            count += len(words) - 1
            unknown += sum((word,) not in self.logs[0] for word in sentence)
        return 10 ** (-total / max(count, 1)), count, unknown


def estimate(sentences: Iterable[Sequence[str]], order: int) -> Ngram:
    """The model of a text.

    Raises:
        ValueError: order below 1, no text, or a token that ARPA reserves or that has a blank in it.
    """
    if order < 1:
        raise ValueError(f"--ngram_num {order}: expected 1 or more")
    counts = _occurrences(sentences, order)
    adjusted = [_adjusted(counts, n) for n in range(1, order + 1)]
    del counts
    logs: list[dict[Gram, float]] = []
    backoffs: dict[Gram, float] = {}
    shares: dict[Gram, float] = {}  # b(c) of the order at work
    discounts, fallback = [], []
    below: dict[Gram, float] = {}
    for n, grams in enumerate(adjusted, start=1):
        amounts = _discounts(grams)
        if amounts is None:
            fallback.append(n)
        discounts.append(amounts or FALLBACK)
        totals: dict[Gram, float] = defaultdict(float)
        taken: dict[Gram, float] = defaultdict(float)
        for gram, a in grams.items():
            totals[gram[:-1]] += a
            taken[gram[:-1]] += discounts[-1][min(a, 3) - 1]
        shares = {context: taken[context] / totals[context] for context in totals}
        if n == 1:
            uniform = 1.0 / len(grams.keys() | {(UNKNOWN,), (END,)})
            probabilities = {(UNKNOWN,): shares[()] * uniform}
        else:
            probabilities = {}
        for gram, a in grams.items():
            context = gram[:-1]
            shorter = below[gram[1:]] if n > 1 else uniform
            own = (a - discounts[-1][min(a, 3) - 1]) / totals[context]
            probabilities[gram] = own + shares[context] * shorter
        if n > 1:
            backoffs.update((context, _log10(share)) for context, share in shares.items())
        logs.append({gram: _log10(p) for gram, p in probabilities.items()})
        below = probabilities
    logs[0][(BEGIN,)] = NEVER
    return Ngram(logs, backoffs, discounts, fallback)


def _occurrences(sentences: Iterable[Sequence[str]], order: int) -> list[Counter]:
    """How often each n-gram of each order occurs in `<s> … </s>`; nothing predicts <s>, so it is no unigram."""
    counts: list[Counter] = [Counter() for _ in range(order)]
    for sentence in sentences:
        if bad := [w for w in sentence if w in (BEGIN, END) or not w or w.split() != [w]]:
            raise ValueError(f"{bad[0]!r} cannot be a token of an ARPA file, which reserves {BEGIN}, {END} and blanks")
        words = (BEGIN, *sentence, END)
        for n in range(1, order + 1):
            counts[n - 1].update(words[i : i + n] for i in range(len(words) - n + 1))
    if not counts[0]:
        raise ValueError("the text is empty")
    del counts[0][(BEGIN,)]
    return counts


def _adjusted(counts: Sequence[Counter], n: int) -> dict[Gram, int]:
    """a of every n-gram of order n."""
    if n == len(counts):
        return dict(counts[n - 1])
    before = Counter(gram[1:] for gram in counts[n])
    return {gram: count if gram[0] == BEGIN else before[gram] for gram, count in counts[n - 1].items()}


def _log10(p: float) -> float:
    return math.log10(p) if p > 0 else NEVER  # a discount may come out as 0


def _discounts(grams: dict[Gram, int]) -> tuple[float, ...] | None:
    """D(n, 1), D(n, 2), D(n, 3); None where the text is too small for them."""
    t = Counter(grams.values())
    if not (t[1] and t[2] and t[3]):
        return None
    shrink = t[1] / (t[1] + 2 * t[2])
    amounts = tuple(k - (k + 1) * shrink * t[k + 1] / t[k] for k in (1, 2, 3))
    return amounts if all(0 <= amount <= k for k, amount in enumerate(amounts, start=1)) else None


def write_arpa(model: Ngram, path: Path) -> None:
    """Write the model as ARPA text, n-grams sorted; in one step, so that a file of that name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write("\\data\\\n")
        file.writelines(f"ngram {n}={len(grams)}\n" for n, grams in enumerate(model.logs, start=1))
        for n, grams in enumerate(model.logs, start=1):
            file.write(f"\n\\{n}-grams:\n")
            for gram in sorted(grams):
                backoff = f"\t{model.backoffs.get(gram, 0.0):.7g}" if n < model.order else ""
                file.write(f"{grams[gram]:.7g}\t{' '.join(gram)}{backoff}\n")
        file.write("\n\\end\\\n")
    new.replace(path)


def tokenizer(units: str, token_type: str, bpemodel: str, symbols: str, cleaner: str):
    """Text -> the tokens that are counted: the recogniser's, or words. `none` for no symbols and no cleaner."""
    clean = text_cleaner(cleaner)
    if units == "word" or symbols == "none":
        name = "wer" if units == "word" else "ter"
        split = splitters("word" if units == "word" else token_type, Path(bpemodel))[name]
        return lambda text: split(clean(text))
    from espnet2.text.build_tokenizer import build_tokenizer  # takes seconds

    espnets = build_tokenizer(token_type, bpemodel=bpemodel, non_linguistic_symbols=symbols)
    return lambda text: espnets.text2tokens(clean(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", type=int, required=True)
    parser.add_argument("--text", type=Path, required=True, help="Kaldi text to count")
    parser.add_argument("--test_text", type=Path, action="append", default=[], help="its perplexity is told")
    parser.add_argument("--units", choices=UNITS, default="token")
    parser.add_argument("--token_type", required=True, choices=("bpe", "char", "word"))
    parser.add_argument("--bpemodel", default="none")
    parser.add_argument("--non_linguistic_symbols", default="none")
    parser.add_argument("--cleaner", default="none")
    parser.add_argument("--output", type=Path, required=True, help="the ARPA file")
    args = parser.parse_args()
    try:
        tokens = tokenizer(args.units, args.token_type, args.bpemodel, args.non_linguistic_symbols, args.cleaner)
        model = estimate(map(tokens, read_table(args.text, empty_values=True).values()), args.order)
        write_arpa(model, args.output)
        print(f"{args.output}: {', '.join(f'{len(g)} {n}-grams' for n, g in enumerate(model.logs, start=1))}")
        if model.fallback:
            orders = ", ".join(map(str, model.fallback))
            print(f"too small a text for discounts of its own at order {orders}: 0.5, 1, 1.5 were used")
        for text in args.test_text:
            figure, count, unknown = model.perplexity(map(tokens, read_table(text, empty_values=True).values()))
            print(f"perplexity of {text}: {figure:.2f} ({count} {args.units}s and ends, {unknown} unknown)")
    except (OSError, ValueError) as error:
        sys.exit(f"ngram: {error}")


if __name__ == "__main__":
    main()
