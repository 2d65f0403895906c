"""What the decoder mends in ESPnet's, measured side by side on the same weights: prints the table of the README.

    python tests/bench/mended.py

Both classes, default size (13 million parameters), V = 500, float32, weights of a fresh model with every bias moved by
N(0, 0.05) as training would; differences are the largest over all outputs (which are normalised to size 1).
"""

from __future__ import annotations

import copy
import platform
from types import SimpleNamespace

import torch
from espnet2.asr_transducer.decoder.mega_decoder import MEGADecoder as Espnet

from espnet_mega_plugin import __version__
from espnet_mega_plugin.decoder import MEGADecoder

V, L = 500, 40


def pair(**options):
    """ESPnet's decoder and ours with the same trained-like weights."""
    torch.manual_seed(0)
    theirs = Espnet(V, **options).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    ours = MEGADecoder(V, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def labels(length: int = L) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.cat([torch.zeros(1, 1, dtype=torch.long), torch.randint(1, V, (1, length - 1))], 1)


def step_error(model) -> float:
    """score, label by label, against forward over the whole sequence."""
    sequence, states, worst = labels(), model.init_state(1), 0.0
    want = model(sequence)[0]
    model.score_cache = {}
    for t in range(L):
        out, states = model.score(sequence[0, : t + 1].tolist(), states)
        worst = max(worst, float((out[0] - want[t]).abs().max()))
    return worst


def batch_error(model) -> float:
    """batch_score of a short hypothesis beside a long one against the same alone."""

    def states_after(sequence):
        states = model.init_state(1)
        for t in range(len(sequence)):
            _, batch = model.batch_score([SimpleNamespace(yseq=sequence[: t + 1], dec_state=states)])
            states = model.select_state(batch, 0)
        return states

    short, long = labels(5)[0].tolist(), labels(30)[0].tolist()
    hyps = [SimpleNamespace(yseq=[*s, 7], dec_state=states_after(s)) for s in (short, long)]
    together, _ = model.batch_score(hyps)
    alone, _ = model.batch_score(hyps[:1])
    return float((together[0] - alone[0]).abs().max())


def fresh_gradient(cls) -> float:
    torch.manual_seed(0)
    model = cls(V)
    out = model(labels(51))
    (out * torch.randn_like(out)).mean().backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())


def fresh_future(cls) -> float:
    """How far the first output of a fresh model moves when only later labels change."""
    torch.manual_seed(0)
    model, sequence = cls(V).eval(), labels()
    other = sequence.clone()
    other[:, 1:] = torch.randint(1, V, (1, L - 1))
    return float((model(sequence)[0, 0] - model(other)[0, 0]).abs().max())


def after_loading(model) -> float:
    """score after load_state_dict, against forward with the same new weights."""
    sequence = labels(2)
    model = copy.deepcopy(model)
    model.score([0], model.init_state(1))
    model.score_cache = {}
    model.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    out, states = model.score([0], model.init_state(1))
    return float((out[0] - model(sequence)[0, 0]).abs().max())


def half(model) -> str:
    try:
        model = copy.deepcopy(model).bfloat16()
        model.score_cache = {}
        _, batch = model.batch_score([SimpleNamespace(yseq=[0], dec_state=model.init_state(1))])
        return f"works ({batch[0]['prev_key'].dtype})".replace("torch.", "")
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error)[:60]}"


@torch.no_grad()
def scoring_rows() -> list[tuple[str, str, str]]:
    rows = []
    for title, options in (
        ("one label at a time against `forward`, simple bias", {}),
        ("… rotary bias", {"rel_pos_bias_type": "rotary"}),
        ("… chunk_size 8", {"chunk_size": 8}),
        ("… truncation_length 8", {"truncation_length": 8}),
    ):
        rows.append((title, *(f"{step_error(model):.1e}" for model in pair(**options))))
    models = pair()
    rows.append(("a hypothesis beside a longer one against alone", *(f"{batch_error(m):.1e}" for m in models)))
    rows.append(("`score` after `load_state_dict` against `forward`", *(f"{after_loading(m):.1e}" for m in models)))
    rows.append(("scoring with bfloat16 weights", *(half(m) for m in models)))
    return rows


def main() -> None:
    rows = scoring_rows()
    classes = (Espnet, MEGADecoder)
    with torch.no_grad():
        rows.append(
            ("fresh model: first output when later labels change", *(f"{fresh_future(c):.1e}" for c in classes))
        )
    rows.append(
        (
            "fresh model: gradient norm of a random weighting of the outputs",
            *(f"{fresh_gradient(c):.1e}" for c in classes),
        )
    )
    print(f"torch {torch.__version__}, CPU {platform.machine()}, espnet_mega_plugin {__version__}\n")
    print("| largest difference | ESPnet's MEGA | this one |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
