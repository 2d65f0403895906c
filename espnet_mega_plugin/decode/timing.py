"""When labels and words were said, and how sure the model was of them.

A transducer emits a label at an encoder frame; its time is where that frame begins:

    seconds = frame * (subsampling of the encoder) * (hop of the frontend) / (sampling rate)

Labels come when the model has heard enough, often some frames late, so a word's time is that of its emission. A label's
confidence is its probability at the frame where it was taken, given the labels before it; a word is as sure as the
least sure of its labels. All belong to one alignment of those that make up a hypothesis' score: wherever hypotheses
became one, that of the more probable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    text: str
    start: float  # seconds, of its first label
    end: float  # seconds, where the frame of its last label ends
    confidence: float  # 0 .. 1


def words(
    tokens: Sequence[str],
    frames: Sequence[float],
    logps: Sequence[float],
    seconds: float,
    token_type: str | None,
    space: str = "<space>",
) -> list[Word]:
    """The words that labels make up.

    Args:
        tokens, frames, logps: of each label.
        seconds: of an encoder frame.
        token_type: bpe: a token with `▁` begins a word; char: `space` parts words; others: each token is one.
    """
    found: list[list[int]] = []
    between = True
    for i, token in enumerate(tokens):
        if token_type == "char" and token == space:
            between = True
            continue
        begins = between or token_type not in ("bpe", "char") or (token_type == "bpe" and token.startswith("▁"))
        if begins:
            found.append([])
        found[-1].append(i)
        between = False
    made = []
    for places in found:
        text = "".join(tokens[i] for i in places)
        text = text.replace("▁", "") if token_type == "bpe" else text
        if text:  # a lone ▁ is no word
            confidence = math.exp(min(logps[i] for i in places))
            made.append(Word(text, frames[places[0]] * seconds, (frames[places[-1]] + 1) * seconds, confidence))
    return made
