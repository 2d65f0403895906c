"""The whole network by its definition: NumPy, float64, one label sequence, a loop for every sum over labels.

It shares nothing with the package but the names of weights and options. Formulas: the tops of mega/block.py and ema.py.
Activation: swish. L labels, D block size, S query/key size, E value size.
"""

from __future__ import annotations

import math

import numpy as np

ESPNETS_EPS = {"basic_norm": 0.25, "layer_norm": 1e-12, "rms_norm": 1e-5, "scale_norm": 1e-5}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def phi(x):
    return x * sigmoid(x)


def normalised(x, weights, name, options):
    """One row. (D,)"""
    kind, arguments = options["normalization_type"], options["normalization_args"]
    eps = arguments.get("eps") or ESPNETS_EPS[kind]
    if kind == "layer_norm":
        centred = x - x.mean()
        return weights[f"{name}.weight"] * centred / math.sqrt((centred**2).mean() + eps) + weights[f"{name}.bias"]
    if kind == "basic_norm":
        return x / math.sqrt((x**2).mean() + math.exp(weights[f"{name}.eps"]))
    if kind == "scale_norm":
        return weights[f"{name}.scale"] * x / max(math.sqrt((x**2).sum()), eps)
    measured = x[: int(len(x) * arguments["partial"])] if arguments.get("partial") else x
    return weights[f"{name}.scale"] * x / (math.sqrt((measured**2).mean()) + eps)


def position_bias(distance, weights, name, options):
    if options["rel_pos_bias_type"] == "simple":
        table = weights[f"{name}.relative_position_bias"]
        return table[len(table) // 2 - distance]
    alpha, beta = weights[f"{name}.alpha"][0], weights[f"{name}.beta"][0]
    half, total = len(alpha) // 2, 0.0
    for k in range(half):
        angle = distance * 10000 ** (-k / half)
        total += (alpha[k] * beta[k] + alpha[k + half] * beta[k + half]) * math.cos(angle)
        total += (alpha[k] * beta[k + half] - alpha[k + half] * beta[k]) * math.sin(angle)
    return total


def averages(x, padding, weights, name, options):
    """Damped moving averages, gated by a residual and the activation. (L, D) -> (L, D)"""
    L, truncation = len(x), options["truncation_length"] or len(x)
    p = sigmoid(weights[f"{name}.damping_factor"][..., 0])  # (D, N)
    q = 1 - p * sigmoid(weights[f"{name}.decay_factor"][..., 0])
    gain = p * weights[f"{name}.ema_expansion_matrix"][..., 0] * weights[f"{name}.kernel_projection_matrix"]
    y = weights[f"{name}.residual_weight"] * x
    for t in range(L):
        for lag in range(min(t + 1, truncation)):
            if not padding[t - lag]:
                y[t] += (gain * q**lag).sum(1) / math.sqrt(p.shape[1]) * x[t - lag]
    return phi(y)


def seen_by(t, padding, options):
    """The places a label attends to: itself and those before it in its chunk or window; padding only for want of more."""
    places = [j for j in range(t + 1)]
    if options["chunk_size"] > 0:
        places = [j for j in places if j // options["chunk_size"] == t // options["chunk_size"]]
    if options["attention_window"] is not None:
        places = [j for j in places if t - j < options["attention_window"]]
    return [j for j in places if not padding[j]] or places


def mega_block(x, padding, weights, name, options):
    """(L, D) -> (L, D)"""
    L, D, S, E = len(x), x.shape[1], options["qk_size"], options["v_size"]
    linear = lambda z, part: weights[f"{name}.{part}.weight"] @ z + weights[f"{name}.{part}.bias"]  # noqa: E731
    norm = lambda z: normalised(z, weights, f"{name}.normalization", options)  # noqa: E731
    inputs = np.stack([norm(row) for row in x]) if options["pre_norm"] else x
    values = [phi(linear(row, "proj_v")) for row in inputs]
    averaged = averages(inputs, padding, weights, f"{name}.multihead_damped_ema", options)
    gates = [np.split(linear(row, "proj_mx"), [D, D + S, D + S + E]) for row in averaged]
    queries, keys = (
        [phi(z) * weights[f"{name}.qk_weight"][i] + weights[f"{name}.qk_bias"][i] for _, z, _, _ in gates]
        for i in (0, 1)
    )
    out = []
    for t in range(L):
        places = seen_by(t, padding, options)
        exponents = [
            queries[t] @ keys[j] / math.sqrt(S) + position_bias(t - j, weights, f"{name}.rel_pos_bias", options)
            for j in places
        ]
        shares = np.exp(np.array(exponents) - max(exponents))
        attended = sum(share * values[j] for share, j in zip(shares / shares.sum(), places, strict=True))
        update, _, reset, intermediate = gates[t]
        candidate = phi(intermediate + linear(attended * phi(reset), "proj_h"))
        mixed = x[t] + sigmoid(update) * (candidate - x[t])
        out.append(mixed if options["pre_norm"] else norm(mixed))
    return np.stack(out)


def feed_forward(x, weights, name, options):
    """One row. (D,)"""
    linear = lambda z, part: weights[f"{name}.{part}.weight"] @ z + weights[f"{name}.{part}.bias"]  # noqa: E731
    norm = lambda z: normalised(z, weights, f"{name}.normalization", options)  # noqa: E731
    if options["pre_norm"]:
        return x + linear(phi(linear(norm(x), "linear1")), "linear2")
    return norm(x + linear(phi(linear(x, "linear1")), "linear2"))


def output(weights: dict[str, np.ndarray], labels: list[int], options: dict) -> np.ndarray:
    """Decoder output for each label of one sequence that begins with the start label. (L, D)"""
    padding = [t > 0 and label == options["embed_pad"] for t, label in enumerate(labels)]
    x = np.stack([weights["embed.weight"][label] for label in labels])
    for b in range(options["num_blocks"]):
        x = mega_block(x, padding, weights, f"mega_blocks.{b}.0", options)
        x = np.stack([feed_forward(row, weights, f"mega_blocks.{b}.1", options) for row in x])
    return np.stack([normalised(row, weights, "final_norm", options) for row in x])
