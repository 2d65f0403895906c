"""The Triton kernels without a GPU: their laws in Triton's interpreter, and what the compiler makes of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: the kernels are not tested")
# ruff: noqa: E402
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from espnet_mega_plugin.rnnt import fused_kernels, fused_rnnt_loss, kernels, loss, rnnt_loss

HERE = Path(__file__).parent
PTXAS = Path(nvidia.__file__).parent / "bin" / "ptxas"
INTEGERS = dict.fromkeys(("labels", "frame_lengths", "label_lengths", "cells", "place"), "*i64")
SIZES = dict.fromkeys(("T", "U1", "V", "J", "blank", "N", "R"), "i32")
FULL = {"cells": None, "COLUMNS": 1024}  # a row for each cell
TILE = {"COLUMNS": 1024}
TANH = {"FORMULA": "tanh", "A": 0.0, "B": 0.0}
FORMULAS = {
    "tanh": (0.0, 0.0),
    "clip": (-0.5, 0.7),
    "leaky": (0.1, 0.0),
    "elu": (1.6732632423543772, 1.0507009873554805),
    "swish": (1.5, 0.0),
    "mish": (0.0, 0.0),
    "smish": (1.2, 0.7),
    "ftswish": (-0.3, 0.1),
    "identity": (0.0, 0.0),
}
HIDDEN, SUMS = {"ROWS": 8, "CHANNELS": 256}, {"OVER_FRAMES": True, "ITEMS": 16, "CHANNELS": 128}


@pytest.mark.parametrize("laws", ["kernel_laws.py", "fused_kernel_laws.py"])
def test_laws_in_the_interpreter(laws):
    """In a process of their own: the interpreter is chosen when Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / laws)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_other_devices_are_refused():
    acts = torch.zeros(1, 2, 1, 3)
    lengths = torch.tensor([2]), torch.tensor([0])
    with pytest.raises(ValueError, match="method 'triton' needs logits on a CUDA device; got cpu"):
        rnnt_loss(acts, torch.zeros(1, 0, dtype=torch.int64), *lengths, method="triton")
    joint = acts[:, :, 0], acts[:, :1, 0], torch.zeros(4, 3), None
    with pytest.raises(ValueError, match="method 'triton' needs enc on a CUDA device; got cpu"):
        fused_rnnt_loss(*joint, torch.zeros(1, 0, dtype=torch.int64), *lengths, method="triton")


def test_auto_is_triton_on_cuda_where_it_runs(monkeypatch):
    monkeypatch.setenv("CC", "cc")
    for broken, method in ((False, "triton"), (True, "wavefront")):
        loss._triton_runs.cache_clear()
        with monkeypatch.context() as patch:
            if broken:
                patch.setitem(sys.modules, "espnet_mega_plugin.rnnt.kernels", None)  # its import raises ImportError
            assert loss.fastest(torch.device("cuda")) == method
            assert loss.fastest(torch.device("cpu")) == "wavefront"
    loss._triton_runs.cache_clear()


def cases():
    """Kernel, types of the pointers that have the logits' and the planes' types, constants, warps."""
    for logits, plane in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp64", "fp64")):
        for name in ("row_statistics", "gradient"):
            for rows, constants in (("full", FULL), ("tile", TILE)):
                if rows == "full" or logits == "bf16":
                    yield pytest.param(name, logits, plane, constants, 4, id=f"{name}-{rows}-{logits}")
    for logits, plane, names in (
        ("fp32", "fp32", FORMULAS),
        ("bf16", "fp32", FORMULAS),
        ("fp16", "fp32", ["smish"]),
        ("fp64", "fp64", ["tanh"]),
    ):
        for name in names:
            A, B = FORMULAS[name]
            constants, ends = {"FORMULA": name, "A": A, "B": B}, f"{name}-{logits}"
            yield pytest.param("hidden", logits, plane, {**constants, **HIDDEN}, 4, id=f"hidden-{ends}")
            items = {"ITEMS": fused_kernels.items(8 if plane == "fp64" else 4, name)}
            for over in (True, False):
                given = {**constants, **SUMS, **items, "OVER_FRAMES": over}
                yield pytest.param("sums", logits, plane, given, 4, id=f"sums-{'frames' if over else 'labels'}-{ends}")
    yield pytest.param("exceeding", "fp32", "fp32", {"ROWS": 256}, 4, id="exceeding-fp32")
    for plane, width in (("fp32", 64), ("fp32", 256), ("fp32", 2048), ("fp32", 4096), ("fp64", 128)):
        constants = {"WIDTH": width, "WANTED": True}
        yield pytest.param("lattice", plane, plane, constants, kernels._warps(width), id=f"lattice-{plane}-{width}")


def compiled(name: str, logits: str, plane: str, constants: dict, warps: int, architecture: int):
    kernel = getattr(kernels, name, None) or getattr(fused_kernels, name)
    if name == "gradient":
        constants = {**constants, "TINY": 1.1754943508222875e-38}
    types = {
        **INTEGERS,
        **SIZES,
        **dict.fromkeys(("logits", "grad", "enc", "dec", "out", "to_hidden"), f"*{logits}"),
        "threshold": "fp32",
        "found": "*i1",
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {argument: types.get(argument, f"*{plane}") for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


@pytest.mark.skipif(not PTXAS.exists(), reason="this Triton has no ptxas: registers are not counted")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name, logits, plane, constants, warps", cases())
def test_compiles_without_spills(tmp_path, monkeypatch, name, logits, plane, constants, warps, architecture):
    """Up to float32 and U = 4095: beyond, `sums` of some formulas in float64 and wide lattices spill a few bytes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    program = compiled(name, logits, plane, constants, warps, architecture)
    assembly = tmp_path / "kernel.ptx"
    assembly.write_text(program.asm["ptx"])
    target = re.search(r"\.target (\w+)", program.asm["ptx"])[1]
    command = [PTXAS, "-v", f"-arch={target}", assembly, "-o", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print(said)
    assert re.findall(r"(\d+) bytes spill", said) == ["0", "0"]
    assert int(re.search(r"Used (\d+) registers", said)[1]) <= 128


def test_every_formula_is_compiled():
    for kernel in (fused_kernels.activated, fused_kernels.derivative):
        assert set(re.findall(r'FORMULA == "(\w+)"', kernel.src)) == set(FORMULAS)


@pytest.mark.parametrize(
    "name, constants",
    [
        ("row_statistics", FULL),
        ("row_statistics", TILE),
        ("lattice", {"WIDTH": 64, "WANTED": True}),
        ("gradient", FULL),
        ("gradient", TILE),
        ("hidden", {**TANH, **HIDDEN}),
        ("sums", {**TANH, **SUMS}),
        ("sums", {**TANH, **SUMS, "OVER_FRAMES": False}),
        ("exceeding", {"ROWS": 256}),
    ],
)
def test_offsets_have_64_bits(tmp_path, monkeypatch, name, constants):
    """Where a row or an utterance begins is computed in 64 bits; 32 are for columns within it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    text = str(compiled(name, "fp32", "fp32", constants, 4, 90).asm["ttir"])
    kernel = getattr(kernels, name, None) or getattr(fused_kernels, name)
    whole = [rf"%{name}" for name in kernel.arg_names]  # pointers to whole tensors, and these for several rows
    whole += re.findall(rf"(%\w+) = tt\.splat (?:{'|'.join(whole)}) ", text)
    offsets = re.findall(rf"tt\.addptr (?:{'|'.join(whole)}), %\w+ : [^,]*, (\S*)", text)
    assert offsets and all("i64" in offset for offset in offsets), text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_real_device(dtype):
    from rnnt_problems import random_problem

    problem = random_problem(3, 40, 10, 700, seed=1, dtype=dtype)
    found = []
    for device in ("cuda", "cpu"):
        acts = problem.acts.to(device, dtype if device == "cuda" else torch.float64).requires_grad_()
        others = [x.to(device).clamp(min=0) for x in problem[1:4]]
        if device == "cuda":
            costs = kernels.triton_rnnt_loss(acts * 1, *others)
        else:
            costs = kernels.wavefront.costs(acts, *others)
        gradient = torch.autograd.grad(costs, acts, torch.ones_like(costs))[0]
        found.append((costs.detach().cpu().double(), gradient.cpu().double()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-4)
    error = (found[0][1] - found[1][1]).norm() / found[1][1].norm()
    assert error < {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.gpu
def test_more_logits_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of GPU memory")
    B, T, U, V = 3, 256, 63, 50000  # 2.46e9 logits
    acts = torch.zeros(B, T, U + 1, V, dtype=torch.bfloat16, device="cuda")
    acts[-1] = torch.linspace(-1, 1, V, device="cuda")
    labels = torch.arange(1, U + 1, device="cuda").repeat(B, 1)
    lengths = torch.full((B,), T, device="cuda"), torch.full((B,), U, device="cuda")
    costs = kernels.triton_rnnt_loss(acts, labels, *lengths)
    alone = kernels.triton_rnnt_loss(acts[-1:].clone(), labels[-1:], *(x[-1:] for x in lengths))
    torch.testing.assert_close(costs[-1:], alone)
