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
