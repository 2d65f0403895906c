"""The decoder's constructor arguments, checked at the door: one exception that names key, value and accepted ones."""

from __future__ import annotations

import math

from espnet_mega_plugin.mega.activation import BUILDERS, DEFAULTS
from espnet_mega_plugin.mega.normalization import EPS

POSITIVE = ("vocab_size", "block_size", "linear_size", "qk_size", "v_size", "num_heads", "max_positions", "num_blocks")
RATES = ("dropout_rate", "embed_dropout_rate", "att_dropout_rate", "ema_dropout_rate", "ffn_dropout_rate")
NAMES = {
    "rel_pos_bias_type": ("simple", "rotary"),
    "normalization_type": tuple(EPS),
    "activation_type": tuple(BUILDERS),
}


def check_arguments(arguments: dict) -> None:
    """Raise TypeError for a wrong type, ValueError for a value out of range. `arguments` holds all of them by name."""
    for key in POSITIVE:
        _integer(key, arguments[key], "an integer, 1 or more", lambda value: value >= 1)
    for key in RATES:
        _number(key, arguments[key], "a number from 0 to 1", lambda value: 0 <= value <= 1)
    for key, accepted in NAMES.items():
        _name(key, arguments[key], accepted)
    _integer("chunk_size", arguments["chunk_size"], "-1 (full context) or 1 and more", lambda v: v == -1 or v >= 1)
    for key in ("truncation_length", "attention_window"):
        if arguments[key] is not None:
            _integer(key, arguments[key], "null or 1 and more", lambda v: v >= 1)
    if arguments["attention_window"] is not None and arguments["chunk_size"] > 0:
        raise ValueError(
            f"attention_window {arguments['attention_window']} and chunk_size {arguments['chunk_size']} exclude each "
            f"other: use chunk_size -1 (full context) with an attention_window, or attention_window null."
        )
    if not isinstance(arguments["pre_norm"], bool):
        _fail(TypeError, "pre_norm", arguments["pre_norm"], "true or false")
    vocab_size = arguments["vocab_size"]
    _integer(
        "embed_pad", arguments["embed_pad"], f"0 to vocab_size - 1 = {vocab_size - 1}", lambda v: 0 <= v < vocab_size
    )
    if arguments["rel_pos_bias_type"] == "rotary" and arguments["qk_size"] % 2:
        raise ValueError(
            f"qk_size must be even with rel_pos_bias_type 'rotary' (channels are turned in pairs); "
            f"got {arguments['qk_size']}. Use {arguments['qk_size'] + 1}, or rel_pos_bias_type 'simple'."
        )
    _activation_arguments(arguments["activation_args"])
    _normalization_arguments(arguments["normalization_args"], arguments["normalization_type"], arguments["block_size"])


def _fail(error: type[Exception], key: str, value: object, accepted: str) -> None:
    raise error(f"{key} must be {accepted}; got {value!r} ({type(value).__name__}).")


def _integer(key: str, value: object, accepted: str, holds) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        _fail(TypeError, key, value, accepted)
    if not holds(value):
        _fail(ValueError, key, value, accepted)


def _number(key: str, value: object, accepted: str, holds) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        _fail(TypeError, key, value, accepted)
    if not math.isfinite(value) or not holds(value):
        _fail(ValueError, key, value, accepted)


def _name(key: str, value: object, accepted: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        _fail(TypeError, key, value, f"one of {', '.join(accepted)}")
    if value not in accepted:
        _fail(ValueError, key, value, f"one of {', '.join(accepted)}")


def _keys(key: str, value: object, accepted: tuple[str, ...]) -> dict:
    if not isinstance(value, dict):
        _fail(TypeError, key, value, f"a mapping with keys among {', '.join(accepted)}")
    for unknown in value.keys() - set(accepted):
        _fail(ValueError, f"{key} key", unknown, f"one of {', '.join(accepted)}")
    return value


def _activation_arguments(value: object) -> None:
    checks = {
        "ftswish_threshold": ("a number below 0", lambda v: v < 0),
        "leakyrelu_neg_slope": ("a number, 0 or more", lambda v: v >= 0),
    }
    given = _keys("activation_args", value, tuple(DEFAULTS))
    for key, number in given.items():
        accepted, holds = checks.get(key, ("a finite number", lambda v: True))
        _number(f"activation_args {key}", number, accepted, holds)
    low, high = ({**DEFAULTS, **given}[key] for key in ("hardtanh_min_val", "hardtanh_max_val"))
    if low >= high:
        _fail(ValueError, "activation_args hardtanh_min_val", low, f"below hardtanh_max_val {high}")


def _normalization_arguments(value: object, normalization_type: str, size: int) -> None:
    given = _keys("normalization_args", value, ("eps", "partial"))
    if given.get("eps") is not None:
        _number("normalization_args eps", given["eps"], "null or a number above 0", lambda v: v > 0)
    if given.get("partial") is not None:
        _number("normalization_args partial", given["partial"], "null or a number", lambda v: True)
        partial = given["partial"]
        if normalization_type == "rms_norm" and 0 < partial < 1 and int(size * partial) < 1:
            _fail(ValueError, "normalization_args partial", partial, f"at least 1 / block_size = {1 / size:.3g}")
