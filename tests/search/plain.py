"""The searches in plain Python: one utterance, one hypothesis after the other, the label sequences as tuples.

Each takes `log_probs(frame, labels)`, the log-probabilities of blank (0) and of every label in an utterance's frame
behind some labels. What ESPnet's `BeamSearchTransducer` does right is done as there; what it does not is right here:

* alsd never hands out a hypothesis that has not come to the last frame, and may take a label where there is one frame.

`bonus(labels)` is what fusion adds to each next label; `final(labels)` what it adds where the utterance ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

BLANK = 0
LogProbs = Callable[[int, tuple[int, ...]], Sequence[float]]
Bonus = Callable[[tuple[int, ...]], Sequence[float]] | None


class Hypothesis(NamedTuple):
    score: float = 0.0
    labels: tuple[int, ...] = ()
    frames: tuple[int, ...] = ()  # of each label
    logps: tuple[float, ...] = ()  # of each label, without bonus

    def ended(self, frame: int, log_probs: LogProbs) -> Hypothesis:
        """After blank."""
        return self._replace(score=self.score + log_probs(frame, self.labels)[BLANK])

    def longer(self, label: int, frame: int, logp: float, bonus: Bonus) -> Hypothesis:
        more = bonus(self.labels)[label] if bonus else 0.0
        return Hypothesis(self.score + logp + more, (*self.labels, label), (*self.frames, frame), (*self.logps, logp))


def logadd(values: Sequence[float]) -> float:
    """log of the sum of exponentials."""
    most = max(values)
    return most if most == -math.inf else most + math.log(sum(math.exp(value - most) for value in values))


def summed(hypotheses: list[Hypothesis]) -> list[Hypothesis]:
    """Equal label sequences are one, with the record of the most probable of them."""
    groups = {}
    for one in hypotheses:
        groups.setdefault(one.labels, []).append(one)
    return [
        max(group, key=lambda one: one.score)._replace(score=logadd([one.score for one in group]))
        for group in groups.values()
    ]


def best(hypotheses: list[Hypothesis], count: int) -> list[Hypothesis]:
    return sorted(hypotheses, key=lambda one: one.score, reverse=True)[:count]


def n_best(hypotheses: list[Hypothesis], count: int, score_norm: bool = False, final=None) -> list[Hypothesis]:
    """As handed out; `score_norm` orders by the score divided by the number of labels, the start label among them."""
    if final:
        hypotheses = [one._replace(score=one.score + final(one.labels)) for one in hypotheses]
    if not score_norm:
        return best(hypotheses, count)
    return sorted(hypotheses, key=lambda one: one.score / (len(one.labels) + 1), reverse=True)[:count]


def _likeliest(values: Sequence[float], count: int, first: int = 0) -> list[int]:
    return sorted(range(first, len(values)), key=lambda k: values[k], reverse=True)[:count]


def greedy(log_probs: LogProbs, T: int, nstep: int, bonus: Bonus = None) -> list[Hypothesis]:
    """The most probable token, again and again; at most `nstep` labels a frame."""
    hypothesis = Hypothesis()
    for t in range(T):
        for _ in range(nstep):
            row = log_probs(t, hypothesis.labels)
            (label,) = _likeliest(row, 1)
            if label == BLANK:
                break
            hypothesis = hypothesis.longer(label, t, row[label], bonus)
        hypothesis = hypothesis.ended(t, log_probs)
    return [hypothesis]


def maes(
    log_probs: LogProbs,
    T: int,
    beam_size: int,
    nstep: int,
    expansion_gamma: float,
    expansion_beta: int,
    bonus: Bonus = None,
) -> list[Hypothesis]:
    beam = [Hypothesis()]
    for t in range(T):
        ended, here = [], beam
        for _ in range(nstep):
            taken = []
            for one in here:
                row = log_probs(t, one.labels)
                tokens = _likeliest(row, beam_size + expansion_beta)
                least = one.score + row[tokens[0]] - expansion_gamma
                tokens = [k for k in tokens if least <= one.score + row[k]]
                ended += [one.ended(t, log_probs) for k in tokens if k == BLANK]
                taken += [one.longer(k, t, row[k], bonus) for k in tokens if k != BLANK]
            here = taken
        beam = best(summed(ended + [one.ended(t, log_probs) for one in here]), beam_size)
    return beam


def tsd(log_probs: LogProbs, T: int, beam_size: int, max_sym_exp: int, bonus: Bonus = None) -> list[Hypothesis]:
    """At most max_sym_exp - 1 labels a frame."""
    beam = [Hypothesis()]
    for t in range(T):
        ended, here = [], beam
        for already in range(max_sym_exp):
            ended += [one.ended(t, log_probs) for one in here]
            if already < max_sym_exp - 1:
                longer = _with_labels(here, [t] * len(here), log_probs, beam_size, bonus)
                here = best([one for some in longer for one in some], beam_size)
        beam = best(summed(ended), beam_size)
    return beam


def alsd(
    log_probs: LogProbs, T: int, beam_size: int, u_max: int, bonus: Bonus = None, finish: bool = True
) -> list[Hypothesis]:
    """At step i a hypothesis with u labels is at frame i - u.

    Args:
        u_max: most labels, but no more than T - 1; where T is 1, 1.
        finish: what has not come to the end after T + u_max steps goes on with blanks alone, if nothing else has.
            False: it is handed out as it is, as by ESPnet.
    """
    steps = T + min(u_max, max(T - 1, 1)) if T else 0
    beam, final = [Hypothesis()], []
    for i in range(steps):
        here = [one for one in beam if i - len(one.labels) < T]
        if not here:
            break
        frames = [i - len(one.labels) for one in here]
        ended = [one.ended(t, log_probs) for t, one in zip(frames, here, strict=True)]
        final += [one for t, one in zip(frames, ended, strict=True) if t == T - 1]
        taken = _with_labels(here, frames, log_probs, beam_size, bonus)
        order = [one for blank, labels in zip(ended, taken, strict=True) for one in (blank, *labels)]
        beam = summed(best(order, beam_size))
    if final or not finish:
        return final or beam
    for one in beam:
        for t in range(steps - len(one.labels), T):
            one = one.ended(t, log_probs)
        final.append(one)
    return final


def _with_labels(hypotheses, frames, log_probs, beam_size, bonus) -> list[list[Hypothesis]]:
    """Each with its most probable labels."""
    longer = []
    for one, t in zip(hypotheses, frames, strict=True):
        row = log_probs(t, one.labels)
        longer.append([one.longer(k, t, row[k], bonus) for k in _likeliest(row, beam_size, first=1)])
    return longer


def search(log_probs: LogProbs, T: int, options: dict, bonus: Bonus = None, final=None) -> list[Hypothesis]:
    """N-best list for the arguments of `BatchedSearch`."""
    algorithm, names = {
        "greedy": (greedy, ("nstep",)),
        "maes": (maes, ("beam_size", "nstep", "expansion_gamma", "expansion_beta")),
        "tsd": (tsd, ("beam_size", "max_sym_exp")),
        "alsd": (alsd, ("beam_size", "u_max")),
    }[options["search_type"]]
    found = algorithm(log_probs, T, *(options[name] for name in names), bonus=bonus)
    return n_best(found, options["nbest"], options.get("score_norm", False), final)
