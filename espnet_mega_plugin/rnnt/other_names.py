"""The door of `arguments.py` for functions that call the same things by other names."""

import re
from collections.abc import Mapping

from torch import Tensor

from espnet_mega_plugin.rnnt import arguments


def problem(
    names: Mapping[str, str],
    shape: tuple[int, int, int, int],
    like: Tensor,
    labels: Tensor,
    frame_lengths: Tensor,
    label_lengths: Tensor,
    blank: int,
    check: bool | None,
) -> arguments.Problem:
    """As `arguments.problem` for logits of this shape, which need not exist.

    Args:
        names: what the caller's user calls acts, labels, act_lens, label_lens, blank, where it is something else.
        shape: (B, T, U+1, V)
        like: has the logits' type and device.
    """
    logits = like.detach().new_empty(1).expand(shape)  # no memory but for one number
    try:
        return arguments.problem(logits, labels, frame_lengths, label_lengths, blank, check)
    except (TypeError, ValueError) as error:
        raise type(error)(_renamed(str(error), names)) from None


def _renamed(text: str, names: Mapping[str, str]) -> str:
    pattern = re.compile(rf"\b({'|'.join(names)})\b")
    return pattern.sub(lambda found: names[found[0]], text)
