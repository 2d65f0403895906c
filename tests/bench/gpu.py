"""All that has to be seen on a GPU, in one call under eight minutes: `python tests/bench/gpu.py [--results FILE]`.

First the checks: losses, decoder and searches on the device against float64 on the CPU, more logits than 32 bits
count, nothing that waits for the device. Then a step of the decoder and the batched search over made-up utterances
(made_up.py), both as they are and recorded as CUDA graphs; the decoder's training; and the benchmark
of bench_loss.py for the losses whose checks passed, in float32 and bfloat16, up to V = 5000 and more than 2**31 logits,
timed by CUDA's events, memory as torch counts its peak. Rows are appended as they come, so a run that is cut off has
left what it had.

Needs torch, and Triton for its kernels; neither ESPnet nor pytest. torchaudio is timed beside it where it imports;
where ESPnet is, its four searches over our decoder are checked, and its MEGA in training and its search are timed, too.
Exits with 1 where a check failed. Without a CUDA device it says so and runs the checks alone, on the CPU, the kernels
in Triton's interpreter.
"""

import argparse
import copy
import itertools
import math
import os
import random
import sys
import time
import unittest.mock
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "rnnt"), str(HERE)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

import bench_loss  # noqa: E402
import harness  # noqa: E402
import made_up  # noqa: E402
import training_case  # noqa: E402
from replayed import replaying  # noqa: E402
from rnnt_problems import random_problem  # noqa: E402

from espnet_mega_plugin.mega.network import MegaNetwork  # noqa: E402
from espnet_mega_plugin.mega.pool import MegaPool  # noqa: E402
from espnet_mega_plugin.mega.prefixes import PrefixMemory  # noqa: E402
from espnet_mega_plugin.mega.step import Constants  # noqa: E402
from espnet_mega_plugin.recording import CudaGraphs  # noqa: E402
from espnet_mega_plugin.rnnt import (  # noqa: E402
    do_rnnt_pruning,
    fused_rnnt_loss,
    get_rnnt_prune_ranges,
    rnnt_loss,
    rnnt_loss_pruned,
    rnnt_loss_smoothed,
)
from espnet_mega_plugin.rnnt import fused as fused_loss  # noqa: E402
from espnet_mega_plugin.search import search as search_module  # noqa: E402
from espnet_mega_plugin.search.search import BatchedSearch  # noqa: E402
from espnet_mega_plugin.search.tree import LabelTree  # noqa: E402

SHAPES = "an4,30 8,150,30,1000 8,250,60,1000 16,400,80,500 4,400,60,5000 32,500,100,2000"
CHANNELS = 512
# The fused loss's ways between its products, by the name of their rows; the device's own is called "fused".
WAYS = {"fused": "wavefront", "fused_triton": "triton"}
if DEVICE == "cuda" and find_spec("triton"):
    WAYS = {"fused": "triton", "fused_wavefront": "wavefront"}
RECORDER_FOR = CudaGraphs if DEVICE == "cuda" else replaying
OPTIONS = (
    {},
    {"rel_pos_bias_type": "rotary", "chunk_size": 8},
    {"attention_window": 6, "pre_norm": True},
    {"truncation_length": 5, "num_heads": 16},
)
ESPNET_SEARCHES = {"default": {}, "tsd": {"max_sym_exp": 3}, "alsd": {"u_max": 20}, "maes": {"nstep": 2}}
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# what rounding to the type does to a gradient, with some room
LIMIT = {F64: 1e-9, F32: 2e-5, BF16: 2e-2, F16: 3e-3}


class Check(NamedTuple):
    what: str  # the loss, by its name in bench_loss.py: it is timed where this passes; or something else
    how: str
    limit: float
    error: Callable[[], float]


# ---- checks: each gives the largest relative error against float64 on the CPU ----------------------------------------


def relative(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    return float((found - exact).norm() / exact.norm())


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    errors = [relative(*pair) for pair in zip(found, exact, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def on(device: str, tensors) -> list:
    return [x.to(device) if isinstance(x, Tensor) else x for x in tensors]


def standard(method: str, dtype: torch.dtype, shape: tuple[int, ...]) -> float:
    problem = random_problem(*shape, seed=1, blank=1, dtype=dtype)
    found = []
    for device, chosen, given in ((DEVICE, method, dtype), ("cpu", "wavefront", F64)):
        acts, *others = on(device, problem)
        acts = acts.to(given).requires_grad_()
        costs = rnnt_loss(acts * 1, *others, reduction="none", fastemit_lambda=0.1, method=chosen)
        found.append([costs, *torch.autograd.grad(costs.sum(), acts)])
    return worst(*found)


JOINT = (3, 40, 10, 30, 16)  # B, T, U, V, J


def joint(dtype: torch.dtype, sizes: tuple[int, ...] = JOINT) -> tuple[list[Tensor], list[Tensor]]:
    """Encoder and decoder outputs, weight and bias; labels and lengths."""
    B, T, U, V, J = sizes
    problem = random_problem(B, T, U, V, seed=2, blank=0)
    draw = torch.Generator().manual_seed(2)
    shapes = ((B, T, J), (B, U + 1, J), (V, J), (V,))
    enc, dec, weight, bias = (torch.randn(shape, generator=draw, dtype=F64) for shape in shapes)
    weight *= (16 / J) ** 0.5  # logits of one spread, whatever J
    return [x.to(dtype) for x in (enc, dec, weight, bias)], list(problem[1:4])


def fused(
    method: str,
    dtype: torch.dtype,
    activation: Callable[[Tensor], Tensor],
    sizes: tuple[int, ...] = JOINT,
    autocast: bool = False,
    tile: int | None = None,
) -> float:
    """With ``tile`` as the bytes of one; infinite where a second backward gives other numbers."""
    inputs, others = joint(dtype, sizes)
    given = [x.to(DEVICE).requires_grad_() for x in inputs]
    limits = (tile, tile) if tile else fused_loss.DEVICE_TILE_BYTES
    with unittest.mock.patch.object(fused_loss, "DEVICE_TILE_BYTES", limits):
        with torch.autocast(DEVICE, dtype=BF16, enabled=autocast):
            costs = fused_rnnt_loss(
                *(*given, *on(DEVICE, others), activation), reduction="none", fastemit_lambda=0.1, method=method
            )
        gradients, again = (torch.autograd.grad(costs.sum(), given, retain_graph=True) for _ in range(2))
    if method == "triton" and not all(map(torch.equal, gradients, again)):
        return math.inf
    found = [costs, *gradients]
    exact = [x.double().requires_grad_() for x in inputs]
    enc, dec, weight, bias = exact
    logits = torch.nn.functional.linear(activation(enc[:, :, None] + dec[:, None]), weight, bias)
    costs = rnnt_loss(logits, *others, reduction="none", fastemit_lambda=0.1, method="wavefront")
    return worst(found, [costs, *torch.autograd.grad(costs.sum(), exact)])


def pruned(dtype: torch.dtype, rnnt_type: str) -> float:
    (enc, dec, weight, _), (labels, frames, lengths) = joint(dtype)
    boundary = torch.stack([torch.zeros_like(frames), torch.zeros_like(frames), lengths, frames], 1)
    boundary[:, 2] = torch.minimum(lengths, frames)  # the other two types need a frame for each label
    found, ranges = [], None
    for device, given in (("cpu", F64), (DEVICE, dtype)):
        leaves = [x.to(device, given).requires_grad_() for x in (enc, dec, weight)]
        am, lm = leaves[0] @ leaves[2].T, leaves[1] @ leaves[2].T
        symbols, limits = on(device, (labels, boundary))
        simple, grads = rnnt_loss_smoothed(lm, am, symbols, 0, 0.1, 0.2, limits, rnnt_type, return_grad=True)
        own = get_rnnt_prune_ranges(*grads, limits, 4)
        ranges = own if ranges is None else ranges  # near a tie other numbers may choose other rows
        assert own.shape == ranges.shape and own.device.type == device
        logits = torch.tanh(sum(do_rnnt_pruning(am, lm, ranges.to(device))))
        loss = rnnt_loss_pruned(logits, symbols, ranges.to(device), 0, limits, rnnt_type)
        found.append([simple, loss, *torch.autograd.grad(simple + loss, leaves)])
    return worst(found[1], found[0])


def decoder(dtype: torch.dtype, **options) -> float:
    """Forward, its gradient, and extend: five labels at once, then one by one."""
    torch.manual_seed(3)
    exact = MegaNetwork(50, block_size=64, linear_size=128, qk_size=16, v_size=64, num_blocks=2, **options).double()
    labels = torch.cat([torch.zeros(3, 1, dtype=torch.long), torch.randint(1, 50, (3, 40))], 1)
    weights = torch.randn(3, 41, 64, dtype=F64)
    network = MegaNetwork(50, block_size=64, linear_size=128, qk_size=16, v_size=64, num_blocks=2, **options)
    network.load_state_dict(exact.state_dict())
    network.to(DEVICE, dtype)
    found = []
    for each, device in ((network, DEVICE), (exact, "cpu")):
        out = each(labels.to(device))
        (out * weights.to(device, out.dtype)).sum().backward()
        found.append([out, each.embed.weight.grad, each.mega_blocks[0][0].proj_v.weight.grad])
    with torch.no_grad():
        memory, parts = network.empty_memory(3), []
        for piece in (labels[:, :5], *labels[:, 5:].split(1, 1)):
            out, memory = network.extend(piece.to(DEVICE), memory)
            parts.append(out)
    return worst([*found[0], torch.cat(parts, 1)], [*found[1], found[1][0]])


def remembered(dtype: torch.dtype, graphs: bool, steps: int = 70, autocast: bool = False, **options) -> float:
    """Hypotheses that share their past, scored label by label through the prefix memory, recorded steps or not."""
    exact = MegaNetwork(50, block_size=64, linear_size=128, qk_size=16, v_size=64, num_blocks=2, **options).double()
    network = copy.deepcopy(exact).to(DEVICE, dtype).eval()
    memory = PrefixMemory(recorder_for=RECORDER_FOR if graphs else None)
    root = memory.root(network)
    beam, draw = [([0], memory.extend(network, lambda _: [root], [0])[1][0])], random.Random(5)
    for _ in range(steps):
        chosen = [(draw.choice(beam), draw.randrange(1, 50)) for _ in range(5)]
        before, labels = [one for (_, one), _ in chosen], [label for _, label in chosen]
        with torch.autocast(DEVICE, dtype=BF16, enabled=autocast):
            out, prefixes = memory.extend(network, lambda _, before=before: before, labels)
        beam = [([*labels, label], one) for ((labels, _), label), one in zip(chosen, prefixes, strict=True)]
    with torch.no_grad():
        want = [exact(torch.tensor([labels]))[0, -1] for labels, _ in beam]
    return relative(out, torch.stack(want))


def espnet_search(dtype: torch.dtype, options: dict, **decoder_options) -> float:
    """Our decoder in a search of ESPnet's, over a whole utterance and in chunks.

    The largest error of what the search is told, and of its scores; infinite where the labels are others.
    """
    from bench_search import Following, LastTwo, Outputs
    from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer
    from espnet2.asr_transducer.joint_network import JointNetwork

    from espnet_mega_plugin.decoder import MEGADecoder

    torch.manual_seed(6)
    sizes = {"block_size": 64, "linear_size": 32, "qk_size": 8, "v_size": 32, "num_blocks": 2}
    exact = MEGADecoder(50, **sizes, **decoder_options).double().eval()
    made = made_up.utterances(1, 50, 64, 24, 4, joint_class=JointNetwork)
    truth, shown = Outputs(exact), Outputs(LastTwo(made.vectors))
    errors, found = [], []

    class Told(Following):
        def _answer(self, out: Tensor, sequences: list[list[int]]) -> Tensor:
            errors.append(relative(out, truth(sequences)))
            return super()._answer(out, sequences).to(out.device, kind)

    with torch.no_grad():
        for device, kind in ((DEVICE, dtype), ("cpu", F64)):
            told = Told(copy.deepcopy(exact).to(device, kind), shown)
            searching_with = BeamSearchTransducer(
                told, copy.deepcopy(made.joint).to(device, kind), 4, nbest=4, **options
            )
            frames = made.frames[0].to(device, kind)
            lists = [searching_with(frames)]
            if options["search_type"] != "alsd":  # ESPnet's does not stream
                *pieces, last = frames.split(7)
                for piece in pieces:
                    searching_with(piece, is_final=False)
                lists.append(searching_with(last))
            found.append([hypothesis for nbest in lists for hypothesis in nbest])
    if [h.yseq for h in found[0]] != [h.yseq for h in found[1]]:
        return math.inf
    scores = [torch.tensor([float(h.score) for h in each], dtype=F64) for each in found]
    return max([relative(*scores), *errors])


def benchmark_steps(results: Path, repeats: int = 30, **sizes) -> list[dict]:
    """One step of the default decoder, as it is and recorded: hypotheses that share all but their last label."""
    rows = []
    for dtype in (F32, BF16):
        network = MegaNetwork(500, **sizes).to(DEVICE, dtype).eval()
        for B, history in ((1, 50), (5, 50), (20, 200)):
            times = {}
            for method, recorder_for in (("as it is", None), ("recorded", RECORDER_FOR)):
                memory = PrefixMemory(recorder_for=recorder_for)
                prefix = memory.root(network)
                for label in range(history):
                    _, (prefix,) = memory.extend(network, lambda _, one=prefix: [one], [label % 499 + 1])
                last = memory.extend(network, lambda _, one=prefix, B=B: [one] * B, list(range(1, B + 1)))[1]

                def run(_, memory=memory, last=last, network=network):
                    for one in last:
                        one.children.clear()  # asked anew, and evaluated anew
                    memory.extend(network, lambda _: last, list(range(1, len(last) + 1)))

                times |= harness.measure(lambda: None, {method: run}, warmup=5, repeats=repeats)
            shape = f"{B} hypotheses, history {history}"
            found = [
                harness.row("decoder_step", method=method, shape=shape, dtype=_name(dtype), repeats=repeats, **t)
                for method, t in times.items()
            ]
            harness.append(found, results)
            rows += found
    return rows


def benchmark_training(results: Path, shapes: list[str], repeats: int = 10, **sizes) -> list[dict]:
    """Forward and backward of the decoder of default size, beside ESPnet's MEGA with the same weights where that is."""
    rows, decoders = [], decoders_in_training(**sizes)
    for autocast, shape, (method, decoder) in itertools.product((False, True), shapes, decoders.items()):
        forward, backward = training_case.case(decoder, *map(int, shape.split(",")), autocast)

        def step(_, forward=forward, backward=backward):
            return backward(forward(None))

        try:
            found = {
                "repeats": repeats,
                "extra_memory_mb": harness.extra_memory(lambda: None, step),
                **harness.measure(lambda: None, {"step": step}, repeats=repeats)["step"],
            }
        except Exception as error:  # a row of its own, by name
            found = {"error": type(error).__name__}
        dtype = "bfloat16 autocast" if autocast else "float32"
        known = {"method": method, "shape": shape.replace(",", "x"), "dtype": dtype, "part": "both"}
        rows.append(harness.row("decoder_training", **known, **found))
        harness.append(rows[-1:], results)
    return rows


def decoders_in_training(**sizes) -> dict[str, torch.nn.Module]:
    if not find_spec("espnet2"):
        return {"ours": MegaNetwork(500, **sizes).to(DEVICE)}
    from bench_decoder import BASELINE
    from mended import pair

    theirs, ours = pair(**sizes)
    return {"ours": ours.to(DEVICE), BASELINE: theirs.to(DEVICE)}


def without_waiting(method: str) -> float:
    """0 where a step runs through while torch raises at whatever makes the host wait; meaningless on a CPU."""
    inputs, others = joint(F32)
    given, labels = [x.to(DEVICE).requires_grad_() for x in inputs], others[0].to(DEVICE)
    lengths = others[1:] if method in WAYS else on(DEVICE, others[1:])

    def step() -> None:
        if method in WAYS:
            loss = fused_rnnt_loss(*given, labels, *lengths, threshold=0, method=WAYS[method])
        else:
            enc, dec, weight, bias = given
            logits = torch.nn.functional.linear(torch.tanh(enc[:, :, None] + dec[:, None]), weight, bias)
            loss = rnnt_loss(logits, labels, *lengths, method=method)
        loss.backward()

    step()  # what is loaded and compiled at first may wait
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return 0.0


class Following(torch.nn.Module):
    """A MEGA decoder at work in a batched search that is shown other outputs, those of a trained model."""

    def __init__(self, network: MegaNetwork, vectors: Tensor):
        super().__init__()
        self.network, self.vocab_size = network, network.vocab_size
        self.register_buffer("vectors", vectors)

    def label_scorer(self):
        return made_up.FollowingScorer(MegaPool(self.network, Constants(self.network)), self.vectors)


def searching(
    device: str, dtype: torch.dtype, count: int, T: int, D: int, **sizes
) -> tuple[Following, torch.nn.Module, Tensor, list[list[int]]]:
    """A decoder, a joint network, utterances and their labels."""
    torch.manual_seed(4)
    task = made_up.utterances(count, 500, D, T, T // 6)
    decoder = Following(MegaNetwork(500, block_size=D, **sizes), task.vectors).to(device, dtype).eval()
    return decoder, task.joint.to(device, dtype), torch.stack(task.frames).to(device, dtype), task.said


class FixedTree(LabelTree):
    """Shapes as on a GPU, on a CPU too."""

    def __init__(self, *given):
        super().__init__(*given)
        self.fixed_shapes = True


def search(search_type: str, dtype: torch.dtype, graphs: bool = False) -> float:
    """Scores of n-best lists against the CPU's in float64; infinite where the labels are others."""
    sizes = {"D": 256, "linear_size": 64, "qk_size": 16, "v_size": 64, "num_blocks": 2}
    found = []
    for device, kind in ((DEVICE, dtype), ("cpu", F64)):
        decoder, joint, frames, _ = searching(device, kind, 5, 31, **sizes)
        lengths = torch.tensor([31, 0, 17, 30, 1], device=device)
        searching_with = BatchedSearch(decoder, joint, 4, search_type, u_max=12, nbest=4)
        tree = LabelTree
        if graphs and not found:  # the first is the one in question
            searching_with.recorder_for, tree = RECORDER_FOR, FixedTree
        with unittest.mock.patch.object(search_module, "LabelTree", tree):
            nbest = searching_with(frames, lengths)
        found.append([[(one.yseq, one.score) for one in hypotheses] for hypotheses in nbest])
    if [[y for y, _ in h] for h in found[0]] != [[y for y, _ in h] for h in found[1]]:
        return math.inf
    scores = [torch.tensor([s for h in each for _, s in h], dtype=F64) for each in found]
    return relative(scores[0], scores[1])


def search_without_waiting(search_type: str) -> float:
    """0 where rounds of a search run through while torch raises at whatever makes the host wait."""
    sizes = {"D": 256, "linear_size": 64, "qk_size": 16, "v_size": 64, "num_blocks": 2}
    decoder, joint, frames, _ = searching(DEVICE, F32, 5, 31, **sizes)
    found = BatchedSearch(decoder, joint, 4, search_type)._search(5, frames.device)
    found.start(torch.ones(5, dtype=torch.bool, device=DEVICE))
    found.frames.set(found.joint.frames(frames), torch.full((5,), 31, device=DEVICE))
    with torch.no_grad():
        found._make_room(found._most_a_round)
        found._round()  # what is loaded at first may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            found._round()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return 0.0


def benchmark_search(
    results: Path, deadline: float, counts: list[int], T: int = 249, sizes: dict | None = None, graphs: bool = True
) -> list[dict]:
    """Seconds of audio a second of search, frames of 40 ms: default size, 64 utterances of 10 s and more.

    With ESPnet its own search is timed, too: over our decoder, as its MEGA cannot be searched with on a GPU, an utterance
    after the other.

    Args:
        graphs: rounds recorded as CUDA graphs, too.
    """
    rows = []
    for dtype in (F32, BF16):
        for count in counts:
            decoder, joint, frames, said = searching(DEVICE, dtype, count, T, **(sizes or {"D": 512}))
            for search_type, beam in (("greedy", 1), ("maes", 4), ("maes", 8), ("tsd", 4)):
                if time.monotonic() > deadline:
                    print(f"not run: {search_type} {count} {_name(dtype)}: out of time", flush=True)
                    continue
                runs = {f"batch of {count}": BatchedSearch(decoder, joint, beam, search_type, window=32)}
                if graphs:
                    recorded = BatchedSearch(decoder, joint, beam, search_type, window=32, cuda_graphs=True)
                    runs[f"batch of {count} recorded"] = recorded
                if count == min(counts) and find_spec("espnet2"):
                    runs["espnet"] = espnets_search(decoder, joint, beam, search_type)
                for method, search_with in runs.items():
                    handed_on = partial(searched, search_with)
                    times = harness.measure(lambda f=frames: f, {"": handed_on}, warmup=1, repeats=3)[""]
                    found = [best[0].yseq[1:] for best in search_with(frames)]
                    figures = f"rtfx {40 * T * count / times['median_ms']:.4g}, errors {made_up.wrong(found, said):.4g}"
                    rows.append(
                        harness.row(
                            f"decode_{search_type}",
                            **{"method": method, "shape": f"{T} frames beam {beam}", "part": figures},
                            **{"dtype": _name(dtype), "repeats": 3, **times},
                            extra_memory_mb=harness.extra_memory(lambda f=frames: f, handed_on),
                        )
                    )
                    harness.append(rows[-1:], results)
    return rows


def searched(search: Callable[[Tensor], list], frames: Tensor) -> Tensor:
    """Hands them on to what is timed next."""
    search(frames)
    return frames


def espnets_search(
    decoder: "Following", joint: torch.nn.Module, beam: int, search_type: str
) -> Callable[[Tensor], list]:
    """The same by ESPnet's BeamSearchTransducer; greedy: its mAES with beam 1."""
    from bench_search import Following as Followed
    from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer
    from espnet2.asr_transducer.joint_network import JointNetwork

    from espnet_mega_plugin.decoder import MEGADecoder

    network, vectors = decoder.network, decoder.vectors
    block, feed_forward = network.mega_blocks[0]
    same = MEGADecoder(
        **{"vocab_size": network.vocab_size, "block_size": network.output_size, "num_blocks": network.num_blocks},
        **{"linear_size": feed_forward.linear1.out_features, "qk_size": block.qk_size, "v_size": block.v_size},
    )
    same.load_state_dict(network.state_dict())
    V, J = joint.lin_out.weight.shape
    theirs = JointNetwork(V, joint.lin_enc.in_features, joint.lin_dec.in_features, J)
    theirs.load_state_dict(joint.state_dict())
    same, theirs = (module.to(vectors).eval() for module in (same, theirs))

    def shown(sequences: list[list[int]]) -> Tensor:
        last = torch.tensor([[0, *one][-2:] for one in sequences], device=vectors.device)
        return vectors[last].sum(1)

    options = {"maes": {"expansion_beta": 2}, "tsd": {"max_sym_exp": 3}}.get(search_type, {"expansion_beta": 0})
    kind = "tsd" if search_type == "tsd" else "maes"
    search = BeamSearchTransducer(Followed(same, shown), theirs, beam, search_type=kind, **options)

    @torch.no_grad()
    def run(frames: Tensor) -> list:
        return [search(one) for one in frames]

    return run


def beyond_32_bits(method: str) -> float:
    """The last utterance of 2.5e9 logits in a batch and alone; needs about 15 GB."""
    B, T, U, V = 3, 256, 63, 50000
    acts = torch.zeros(B, T, U + 1, V, dtype=BF16, device=DEVICE)
    acts[-1] = torch.linspace(-1, 1, V, device=DEVICE)
    labels = torch.arange(1, U + 1, device=DEVICE).repeat(B, 1)
    lengths = [torch.full((B,), n, device=DEVICE) for n in (T, U)]
    found = []
    for first in (0, B - 1):
        leaf = acts[first:].requires_grad_()
        costs = rnnt_loss(leaf * 1, *(x[first:] for x in (labels, *lengths)), reduction="none", method=method)
        gradient = torch.autograd.grad(costs.sum(), leaf)[0]
        found.append([costs[-1], gradient[-1, :: T // 8]])
        acts = acts.detach()
        del leaf, gradient
    return worst(*found)


def checks() -> list[Check]:
    big = DEVICE == "cuda"
    methods = ("wavefront", "triton") if find_spec("triton") else ("wavefront",)
    found = []
    for method in methods:
        for dtype in (F64, F32, BF16, F16):
            shape = (3, 40, 10, 700) if big or method == "wavefront" else (2, 6, 3, 40)
            found.append(
                Check(method, f"{_name(dtype)} {shape}", LIMIT[dtype], partial(standard, method, dtype, shape))
            )
        shape = (2, 20, 1500, 8) if big else (1, 2, 40, 3)
        found.append(Check(method, f"float32 {shape}", 1e-3, partial(standard, method, F32, shape)))
    for name, method in WAYS.items():
        if method in methods:
            found += fused_checks(name, method, JOINT if big or method == "wavefront" else (2, 6, 3, 20, 8))
    for rnnt_type in ("regular", "modified", "constrained"):
        for dtype in (F64, F32):
            found.append(
                Check("pruned", f"{_name(dtype)} {rnnt_type}", LIMIT[dtype], partial(pruned, dtype, rnnt_type))
            )
    for dtype, limit in ((F64, 1e-9), (F32, 1e-4), (BF16, 0.1)):
        for options in OPTIONS:
            how = " ".join([_name(dtype), *(f"{key}={value}" for key, value in options.items())])
            found.append(Check("decoder", how, limit, partial(decoder, dtype, **options)))
            if options:
                found.append(
                    Check("decoder", f"{how} prefix memory", limit, partial(remembered, dtype, False, 40, **options))
                )
        for graphs in (False, True):
            how = f"{_name(dtype)} prefix memory{' of recorded steps' * graphs}"
            found.append(Check("graphs" if graphs else "decoder", how, limit, partial(remembered, dtype, graphs)))
    how = "float32 under bfloat16 autocast, prefix memory"
    found.append(Check("decoder", how, 0.1, partial(remembered, F32, False, autocast=True)))
    found.append(Check("decoder", "float16 prefix memory", 0.02, partial(remembered, F16, False)))
    if find_spec("espnet2"):
        for kind, options in ESPNET_SEARCHES.items():
            for dtype, limit in ((F64, 1e-9), (F32, 1e-4)):
                given = {"search_type": kind, **options}
                how = f"{_name(dtype)} {kind}"
                found.append(Check("espnet_search", how, limit, partial(espnet_search, dtype, given)))
                how += " attention_window=3 pre_norm=True"
                ours = {"attention_window": 3, "pre_norm": True}
                found.append(Check("espnet_search", how, limit, partial(espnet_search, dtype, given, **ours)))
    for dtype, limit in ((F64, 1e-9), (F32, 1e-4)):
        for kind in ("greedy", "maes", "tsd", "alsd"):
            found.append(Check("search", f"{_name(dtype)} {kind}", limit, partial(search, kind, dtype)))
        for kind in ("greedy", "maes", "tsd"):
            how = f"{_name(dtype)} {kind} of recorded rounds"
            found.append(Check("search_graphs", how, limit, partial(search, kind, dtype, graphs=True)))
    if big:
        for method in (*methods, *WAYS):
            found.append(Check("host", f"{method} waits for no device", 0.0, partial(without_waiting, method)))
        for kind in ("greedy", "maes", "tsd"):
            found.append(Check("host", f"{kind} waits for no device", 0.0, partial(search_without_waiting, kind)))
    if big and torch.cuda.mem_get_info()[0] > 20e9:
        for method in methods:  # last: a wrong offset ends all that this process does on the device
            found.append(Check(method, "beyond 32 bits", 1e-2, partial(beyond_32_bits, method)))
    return found


def fused_checks(name: str, method: str, sizes: tuple[int, ...]) -> list[Check]:
    """Activations with a formula and without, autocast; on a device several tiles, wide joint spaces, long labels."""
    found = []

    def add(how: str, limit: float, *given, **options) -> None:
        found.append(Check(name, how, limit, partial(fused, method, *given, **options)))

    for dtype in (F64, F32, BF16, F16):
        for activation in (torch.tanh, torch.nn.SiLU(), torch.nn.GELU()):
            how = f"{_name(dtype)} {getattr(activation, '__name__', activation)}"
            add(how, 3 * LIMIT[dtype], dtype, activation, sizes)
    add("float32 under bfloat16 autocast", 0.1, F32, torch.tanh, sizes, autocast=True)
    if DEVICE == "cuda":
        for activation in (
            torch.nn.ReLU(),
            torch.nn.LeakyReLU(),
            torch.nn.SELU(),
            torch.nn.Mish(),
            torch.nn.Identity(),
        ):
            add(f"float64 {type(activation).__name__}", LIMIT[F64], F64, activation)
        for dtype in (F64, F32):
            add(f"{_name(dtype)} tiles of 256 cells", 3 * LIMIT[dtype], dtype, torch.tanh, tile=1)
            add(f"{_name(dtype)} 2000 channels", 3 * LIMIT[dtype], dtype, torch.tanh, (3, 50, 9, 701, 2000), tile=1)
        add("float32 1500 labels", 1e-3, F32, torch.tanh, (2, 20, 1500, 8, 24), tile=1)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def checked() -> set[str]:
    """Runs the checks and prints a line for each; what failed."""
    failed = set()
    for check in checks():
        try:
            error = check.error()
            passed = error <= check.limit  # a NaN is not
            said = f"error {error:.1e}, limit {check.limit:.0e}"
        except Exception as exception:
            passed, said = False, f"{type(exception).__name__}: {exception}".splitlines()[0]
        failed |= set() if passed else {check.what}
        print(f"{'passed' if passed else 'FAILED'}  {check.what}, {check.how}: {said}", flush=True)
    return failed


# ---- the benchmark --------------------------------------------------------------------------------------------------


def benchmark(failed: set[str], results: Path, deadline: float, shapes: list[str]) -> list[dict]:
    """Rows of every loss that is here and right; those begun before the deadline."""
    here = [name for name in (*bench_loss.LOSSES, *bench_loss.WITH_JOINT) if name not in failed]
    here = [name for name in here if name not in ("torchaudio", "triton") or find_spec(name)]
    with_joint_only = [name for name in WAYS if name == "fused_wavefront" and name not in failed]
    bandwidth = harness.copy_bandwidth(DEVICE)
    print(f"\nThe device copies {bandwidth / 1e9:.0f} GB/s (read and written).", flush=True)
    rows, left_out = [], []
    for case in map(bench_loss.Case.parsed, shapes):
        for dtype in (F32, BF16):
            for with_joint in (False, True):
                for name in here + with_joint_only * with_joint:
                    if not bench_loss.runs(name, case, with_joint, DEVICE):
                        continue
                    known = f"{name} {case.name} {_name(dtype)}{' with the joint network' if with_joint else ''}"
                    if name == "torchaudio" and case.logits >= 2**31:
                        print(f"not run: {known}: its offsets have 32 bits", flush=True)
                        continue
                    if time.monotonic() > deadline:
                        left_out.append(known)
                        continue
                    options = dtype, DEVICE, 10, bandwidth
                    if with_joint:
                        found = bench_joint(name, case, CHANNELS, *options)
                    else:
                        found = bench_loss.bench(name, case, *options)
                    harness.append(found, results)
                    rows += found
                    torch.cuda.empty_cache()
    if left_out:
        print(f"\nOut of time, not run: {'; '.join(left_out)}")
    return rows


def bench_joint(name: str, *given) -> list[dict]:
    """bench_loss.py's, for the fused loss with PyTorch between its products, too."""
    if name != "fused_wavefront":
        return bench_loss.bench_joint(name, *given)
    with unittest.mock.patch.object(bench_loss, "fused_rnnt_loss", partial(fused_rnnt_loss, method=WAYS[name])):
        return [{**row, "method": name} for row in bench_loss.bench_joint("fused", *given)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="CSV file to append to")
    parser.add_argument("--minutes", type=float, default=7, help="after which nothing more is begun")
    parser.add_argument("--shapes", nargs="+", default=SHAPES.split(), help="as of bench_loss.py")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # the interpreter's log(0) is meant
    if DEVICE == "cpu":
        print("No CUDA device here: the checks run on the CPU, nothing is measured.", flush=True)
    else:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    failed = checked()
    if DEVICE == "cuda":
        if not failed & {"decoder", "graphs"}:
            found = benchmark_steps(args.results)
            found += benchmark_training(args.results, ["16,50", "64,64", "8,200"])
            shown = ("what", "method", "shape", "dtype", "median_ms", "p20_ms", "p80_ms", "extra_memory_mb", "error")
            print("\n" + harness.table(found, shown))
        if "search" not in failed:
            graphs = "search_graphs" not in failed
            found = benchmark_search(args.results, time.monotonic() + 60 * args.minutes / 3, [1, 64], graphs=graphs)
            print(
                "\n"
                + harness.table(found, ("what", "method", "shape", "dtype", "part", "median_ms", "extra_memory_mb"))
            )
        rows = benchmark(failed, args.results, deadline, args.shapes)
        print("\n" + bench_loss.tables(rows, "torchaudio" if find_spec("torchaudio") else "wavefront"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
