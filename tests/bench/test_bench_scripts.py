"""The benchmarks run, count what they say they count, and refuse figures of a decoder that answers wrong."""

import csv

import bench_decode
import bench_decoder
import bench_ema
import bench_loss
import bench_packed
import bench_search
import made_up
import pytest
import torch
from mended import pair


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def rows_of(path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_quick_decoder_benchmark(tmp_path, capsys):
    bench_decoder.main(["--quick", "--results", str(tmp_path / "results.csv")])
    rows = rows_of(tmp_path / "results.csv")
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| decoder_")]
    assert len(shown) == len(rows)
    assert not any(row["error"] for row in rows) and all(float(row["median_ms"]) > 0 for row in rows)
    steps = {(row["method"], row["shape"], row["part"]) for row in rows if row["what"] == "decoder_step"}
    methods = [("ours", "all but 8 shared"), ("ours", "nothing shared"), ("espnet_mega", ""), ("espnet_lstm", "")]
    cells = {(name, f"{n}x{history}", part) for name, part in methods for n in (1, 3) for history in (10, 20)}
    assert cells <= steps
    trained = {(row["method"], row["part"]) for row in rows if row["what"] == "decoder_training"}
    assert trained == {(name, part) for name in ("ours", "espnet_mega") for part in ("forward", "backward", "both")}


@pytest.mark.parametrize("own", [8, None])
@torch.no_grad()
def test_hypotheses_of_a_step_share_what_they_should(own):
    decoder = pair(**bench_decoder.SMALL)[1]
    rows = [set(hyp.dec_state.prefixes[0].rows.tolist()) for hyp in bench_decoder.beam(decoder, 3, 20, own)]
    assert [len(one) for one in rows] == [20] * 3
    assert len(set.union(*rows)) == (12 + 3 * 8 if own else 3 * 20)


def test_quick_search_benchmark(tmp_path, capsys):
    bench_search.main(["--quick", "--results", str(tmp_path / "results.csv")])
    rows = rows_of(tmp_path / "results.csv")
    assert "decodes" in capsys.readouterr().out
    assert not any(row["error"] for row in rows)
    timed = [row for row in rows if row["what"] != "search_memory"]
    decodes = [(row["method"], row["shape"]) for row in rows if row["what"] == "search_memory"]
    assert decodes == [(method, f"{n} decodes") for method in ("espnet_lstm", "ours") for n in (1, 3)]
    for search in ("default", "tsd", "alsd", "maes"):
        counts = {row["method"]: row["part"].split(", ") for row in timed if row["what"] == f"search_{search}"}
        assert len(counts) == 4
        calls, asked, evaluated = zip(*counts.values(), strict=True)
        assert len(set(calls)) == len(set(asked)) == 1  # one trajectory for all
        assert min(int(count.split()[0]) for count in evaluated) == int(counts["ours"][2].split()[0])


@torch.no_grad()
def test_no_figures_of_a_decoder_that_answers_wrong():
    decoder = pair(**bench_search.SMALL)[1]
    task = bench_search.synthetic("short", decoder.output_size, 12, 2)
    bench_search.check(decoder, task, frames=12)
    right = decoder.batch_score
    decoder.batch_score = lambda hyps: (right(hyps)[0] + 1e-2, right(hyps)[1])
    with pytest.raises(AssertionError, match="not close"):
        bench_search.check(decoder, task, frames=12)


def test_quick_decode_benchmark(tmp_path, capsys):
    bench_decode.main(["--quick", "--results", str(tmp_path / "results.csv")])
    rows = rows_of(tmp_path / "results.csv")
    assert not any(row["error"] for row in rows)
    for decoder in ("mega", "rnn"):
        for search in ("greedy", "maes", "tsd"):
            methods = {row["method"] for row in rows if row["what"] == f"decode_{decoder}_{search}"}
            assert methods == {"espnet", "batch of 2"}
    timed = [row for row in rows if row["what"] != "decode_state"]
    assert all("rtf" in row["part"] and "errors" in row["part"] for row in timed)
    assert [float(row["extra_memory_mb"]) > 0 for row in rows if row["what"] == "decode_state"] == [True, True]


def test_quick_loss_benchmark(tmp_path, capsys):
    bench_loss.main(["--quick", "--results", str(tmp_path / "results.csv")])
    rows = rows_of(tmp_path / "results.csv")
    assert capsys.readouterr().out.count("the machine copies") == 2
    both = {(row["what"], row["method"]): row for row in rows if row["part"] == "both"}
    assert not any(row["error"] for row in rows)
    assert {method for what, method in both if what == "rnnt_loss"} >= {"torchaudio", "wavefront", "reference"}
    assert {method for what, method in both if what == "joint_16_rnnt_loss"} >= {"torchaudio", "fused", "pruned"}
    for (_, method), row in both.items():
        assert float(row["median_ms"]) > 0
        assert method == "pruned" or float(row["gradient_error"]) < 1e-5


def test_large_shapes_are_not_multiplied_out_on_a_cpu():
    large, small = (bench_loss.Case.parsed(shape) for shape in ("2,500,100,5000", "8,250,60,1000"))
    assert [bench_loss.runs("fused", case, True, "cpu") for case in (large, small)] == [False, True]
    assert bench_loss.runs("wavefront", large, False, "cpu") and bench_loss.runs("fused", large, True, "cuda")


def test_quick_ema_benchmark(tmp_path, capsys):
    bench_ema.main(["--quick", "--results", str(tmp_path / "results.csv")])
    rows = rows_of(tmp_path / "results.csv")
    assert not any(row["error"] for row in rows) and capsys.readouterr().out.count("| scan |") == 8
    assert {row["method"] for row in rows} == {"espnet", "autograd", "scan", "ours"}


def test_quick_benchmark_of_packed_layers(tmp_path, capsys):
    bench_packed.main(["--quick", "--results", str(tmp_path / "results.csv")])
    rows = rows_of(tmp_path / "results.csv")
    assert [row["part"] for row in rows] == ["plain", "packed"] * 2
    assert [row["shape"].split()[0] for row in rows] == ["1", "1", "5", "5"]
    assert capsys.readouterr().out.count("MB |") == 4


def test_edit_distance():
    pairs = ("", ""), ("", "ab"), ("ab", ""), ("kitten", "sitting")
    assert [made_up.distance(list(a), list(b)) for a, b in pairs] == [0, 2, 2, 3]
    assert made_up.wrong([[1, 2], [3]], [[1, 4], [3, 5]]) == 50
