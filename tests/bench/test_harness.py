"""The benchmarks' own rules."""

import csv

import harness
import pytest
import torch


def test_no_figures_on_a_red_test(tmp_path):
    red, green = tmp_path / "test_red.py", tmp_path / "test_green.py"
    red.write_text("def test_it():\n    assert 1 == 2\n")
    green.write_text("def test_it():\n    pass\n")
    harness.require_green(str(green))
    with pytest.raises(SystemExit, match=r"(?s)assert 1 == 2.*test_red.py is red"):
        harness.require_green(str(red))


def test_each_part_takes_what_the_one_before_returned():
    seen = []
    parts = {"first": lambda state: state + 1, "second": seen.append}
    times = harness.measure(lambda: 1, parts, warmup=1, repeats=3)
    assert seen == [2] * 4
    assert list(times) == ["first", "second"]
    assert times["first"]["p20_ms"] <= times["first"]["median_ms"] <= times["first"]["p80_ms"]


def test_one_thread_is_compared_by_cpu_time_several_by_the_clock():
    def measured(method, threads, **times):
        return {"method": method, "threads": threads, **times}

    rows = [
        measured("ours", 1, median_ms=5.0, cpu_ms=2.0),
        measured("theirs", 1, median_ms=50.0, cpu_ms=6.0),
        measured("ours", 2, median_ms=4.0, cpu_ms=8.0),
        measured("theirs", 2, median_ms=20.0, cpu_ms=16.0),
        measured("ours", 4, median_ms=1.0, cpu_ms=1.0),  # nothing to compare it with
        measured("broken", 1, error="RuntimeError"),
    ]
    found = harness.compared(rows, {"method": "theirs"}, lambda r: r["threads"])
    one_thread = 10.0 if torch.cuda.is_available() else 3.0
    assert [row.get("times_as_fast") for row in found] == [one_thread, 1.0, 5.0, 1.0, None, None]


def test_extra_memory_is_the_peak_and_not_what_is_left():
    held = harness.extra_memory(lambda: 200_000_000, lambda n: torch.ones(n, dtype=torch.uint8)[0].item())
    if held is None:
        pytest.skip("this platform does not tell its peak memory")
    assert 190 < held < 230


def test_rows_are_appended_under_one_header(tmp_path):
    path = tmp_path / "results.csv"
    for method in ("a", "b"):
        harness.append([harness.row("loss", method=method, median_ms=1.23456789)], path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["a", "b"]
    assert rows[0]["median_ms"] == "1.235" and rows[0]["torch"] == torch.__version__ and rows[0]["commit"]
