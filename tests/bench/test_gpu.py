"""gpu.py where there is no GPU: checks pass on the CPU, the benchmark fills its rows, with and without ESPnet."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CODE = """
import sys, time
for name in ("espnet", "espnet2", "pytest", "hypothesis", "numba", "triton"):
    sys.modules[name] = None  # importing it raises; Triton's kernels have tests of their own
import gpu, pathlib
failed = gpu.checked()
gpu.benchmark(failed, pathlib.Path(sys.argv[1]), time.monotonic() + 60, ["2,6,3,20", "an4,7"])
gpu.benchmark(failed, pathlib.Path(sys.argv[1]), 0, ["2,6,3,20"])
small = {"D": 256, "linear_size": 64, "qk_size": 16, "v_size": 64, "num_blocks": 2}
gpu.benchmark_steps(pathlib.Path(sys.argv[1]), 1, block_size=16, linear_size=16, qk_size=8, v_size=16, num_blocks=1)
gpu.benchmark_training(pathlib.Path(sys.argv[1]), ["2,7"], 1, block_size=16, linear_size=16, qk_size=8, v_size=16)
gpu.benchmark_search(pathlib.Path(sys.argv[1]), time.monotonic() + 60, [2], 20, small)
sys.exit(f"failed: {failed}" if failed else 0)
"""
WITH_ESPNET = """
import sys, time
import gpu, pathlib
gpu.checks, every = lambda: [one for one in every() if one.what == "espnet_search" and "float64" in one.how], gpu.checks
failed = gpu.checked()
small = {"D": 256, "linear_size": 64, "qk_size": 16, "v_size": 64, "num_blocks": 2}
gpu.benchmark_search(pathlib.Path(sys.argv[1]), time.monotonic() + 5, [1], 20, small, graphs=False)
sys.exit(f"failed: {failed}" if failed else 0)
"""


def run(code: str, folder: Path) -> tuple[str, list[dict]]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", code, str(folder / "rows.csv")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and "FAILED" not in done.stdout
    return done.stdout, list(csv.DictReader((folder / "rows.csv").open()))


@pytest.mark.slow
def test_espnets_searches_beside_ours(tmp_path):
    said, rows = run(WITH_ESPNET, tmp_path)
    assert said.count("passed  espnet_search") == 8
    found = {row["method"]: row["part"].split("errors ")[1] for row in rows if row["what"] == "decode_greedy"}
    assert found["espnet"] == found["batch of 1"]


@pytest.mark.slow
def test_checks_and_benchmark_without_a_gpu(tmp_path):
    said, rows = run(CODE, tmp_path)
    assert "passed  decoder" in said and "passed  search" in said and "espnet_search" not in said
    assert "Out of time, not run: " in said.splitlines()[-1]
    assert {row["what"] for row in rows if row["part"].startswith("rtfx ")} == {
        "decode_greedy",
        "decode_maes",
        "decode_tsd",
    }
    trained = [row for row in rows if row["what"] == "decoder_training"]
    assert [(row["method"], row["dtype"], row["error"]) for row in trained] == [
        ("ours", "float32", ""),
        ("ours", "bfloat16 autocast", ""),
    ]
    for what, methods in (("rnnt_loss", {"wavefront"}), ("joint_512_rnnt_loss", {"wavefront", "fused", "pruned"})):
        for shape in ("2x6x4x20", "an4:7x72x37x7"):
            for dtype, limit in (("float32", 1e-5), ("bfloat16", 0.05)):
                found = [
                    r for r in rows if (r["what"], r["shape"], r["dtype"], r["part"]) == (what, shape, dtype, "both")
                ]
                assert methods <= {r["method"] for r in found}
                errors = {r["method"]: float(r["gradient_error"] or "nan") for r in found}
                assert all(errors[method] < limit for method in methods - {"pruned"}), errors
