"""Parallel jobs, key files and the merging of results."""

import subprocess
import sys
import time

import pytest

from espnet_mega_plugin.recipe.decode import MERGED, merge, plan
from espnet_mega_plugin.recipe.jobs import Job, JobFailed, module_and_arguments, numbered, run_jobs
from espnet_mega_plugin.recipe.progress import LogFollower, clock
from espnet_mega_plugin.recipe.stats import even_parts, number_of_jobs, split_keys, write_text_shapes

WORKER = [sys.executable, "-m", "espnet_mega_plugin.recipe.worker"]

# A module with a main as ESPnet's commands have: says its process, argument and log level's effect
COMMAND = """
import logging, os, sys
def main(cmd=None):
    cmd = sys.argv[1:] if cmd is None else cmd
    logging.basicConfig(level="ERROR" if cmd[0] == "quiet" else "INFO", format="%(levelname)s %(message)s")
    logging.info("says %s", cmd[0])
    print("process", os.getpid())
    if cmd[0] == "exit":
        sys.exit(int(cmd[1]))
    if cmd[0] == "raise":
        raise RuntimeError("came to grief")
if __name__ == "__main__":
    main()
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    (tmp_path / "some_command.py").write_text(COMMAND)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return [sys.executable, "-m", "some_command"]


@pytest.mark.parametrize("worker", [(), WORKER], ids=["processes", "workers"])
def test_every_job_runs_with_its_own_log(tmp_path, command, worker):
    jobs = [Job([*command, f"job{i}"], tmp_path / "log" / f"{i}.log") for i in range(7)]
    run_jobs(jobs, 2, worker)
    processes = set()
    for i, job in enumerate(jobs):
        first, *rest = job.log.read_text().splitlines()
        assert first.startswith("# ") and first.endswith(f"some_command job{i}")
        assert f"INFO says job{i}" in rest
        processes |= {line for line in rest if line.startswith("process")}
    assert len(processes) == 7 if not worker else 1 <= len(processes) <= 2


def test_jobs_of_one_worker_log_as_each_wants(tmp_path, command):
    """logging.basicConfig takes effect once a process, and each of ESPnet's commands calls it."""
    jobs = [Job([*command, word], tmp_path / f"{word}.log") for word in ("quiet", "loud")]
    run_jobs(jobs, 1, WORKER)
    assert "says" not in jobs[0].log.read_text() and "says loud" in jobs[1].log.read_text()


@pytest.mark.parametrize("worker", [(), WORKER], ids=["processes", "workers"])
@pytest.mark.parametrize(("arguments", "says"), [(["exit", "3"], "exit status 3"), (["raise"], "came to grief")])
def test_a_failure_shows_the_end_of_its_log(tmp_path, command, worker, arguments, says):
    jobs = [Job([*command, "fine"], tmp_path / "1.log"), Job([*command, *arguments], tmp_path / "2.log")]
    with pytest.raises(JobFailed, match=says) as failure:
        run_jobs(jobs, 1, worker)
    assert f"end of {tmp_path / '2.log'}" in str(failure.value) and f"says {arguments[0]}" in str(failure.value)


def test_a_failure_stops_the_others(tmp_path):
    jobs = [
        Job([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "slow.log"),
        Job([sys.executable, "-c", "raise SystemExit('no')"], tmp_path / "fails.log"),
    ]
    began = time.monotonic()
    with pytest.raises(JobFailed, match="fails.log"):
        run_jobs(jobs, 2)
    assert time.monotonic() - began < 20


def test_a_worker_that_cannot_start_is_a_failure(tmp_path, command):
    with pytest.raises(JobFailed, match="no_such_module"):
        run_jobs([Job([*command, "fine"], tmp_path / "1.log")], 1, [sys.executable, "-m", "no_such_module"])


def test_command_line_numbers_its_jobs(tmp_path):
    call = [sys.executable, "-m", "espnet_mega_plugin.recipe.jobs", "--gpu", "1", "JOB=1:3", f"{tmp_path}/JOB.log"]
    subprocess.run([*call, "echo", "--", "part", "JOB"], check=True)
    assert [(tmp_path / f"{n}.log").read_text().splitlines()[1] for n in (1, 2, 3)] == [
        f"-- part {n}" for n in (1, 2, 3)
    ]
    failing = subprocess.run([*call, "ls", f"{tmp_path}/nothing/JOB"], capture_output=True, text=True)
    assert failing.returncode == 1 and "nothing" in failing.stderr


def test_only_the_word_job_is_a_number():
    """Folders and options of the user may have the letters in a name."""
    for text in ("exp/JOBS/logdir/stats.JOB.log", "exp/MYJOB/x.JOB", "exp/MY_JOB_1/train.JOB.scp", "JOB", "/JOB/"):
        *names, last = text.rsplit("JOB", 1)
        assert numbered(text, 7) == "7".join([*names, last])


def test_module_of_a_command():
    words = "python3 -m espnet_mega_plugin.run -m espnet2.bin.x --a 1".split()
    assert module_and_arguments(words) == ("espnet2.bin.x", ["--a", "1"])
    with pytest.raises(ValueError, match="no '-m module'"):
        module_and_arguments(["ls"])


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lines", "parts"), [(10, 3), (3, 3), (7, 1), (11, 4), (1, 1)])
def test_parts_keep_the_order_and_are_even(lines, parts):
    split = even_parts(range(lines), parts)
    assert [line for part in split for line in part] == list(range(lines))
    assert len(split) == parts and max(map(len, split)) - min(map(len, split)) <= 1


def test_number_of_jobs_is_worth_their_start():
    assert number_of_jobs(8, 5, 1) == 1  # a set with one utterance
    assert number_of_jobs(8, 100, 50) == 1  # one process does this in less than the start of another
    assert number_of_jobs(2, 1500, 100) == 2
    assert number_of_jobs(32, 100_000, 20) == 20


def test_key_files_hold_every_utterance_once(tmp_path):
    for name, count in (("train", 1201), ("valid", 3)):
        (tmp_path / f"{name}.scp").write_text("".join(f"utt{i:04} a/{i}.flac\n" for i in range(count)))
    scps = {name: tmp_path / f"{name}.scp" for name in ("train", "valid")}
    assert split_keys(scps, tmp_path / "log", 4) == 3
    for name in scps:
        parts = [(tmp_path / "log" / f"{name}.{job}.scp").read_text() for job in (1, 2, 3)]
        assert "".join(parts) == scps[name].read_text() and all(parts)


def test_text_shapes_get_the_size_of_the_vocabulary(tmp_path):
    (tmp_path / "tokens.txt").write_text("<blank>\n<unk>\n\u2028\nA\n<sos/eos>\n", encoding="utf-8")
    for part in ("train", "valid"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "text_shape").write_text("a 3\nb 12\n")
    write_text_shapes(tmp_path, tmp_path / "tokens.txt", "char")
    assert (tmp_path / "train" / "text_shape.char").read_text() == "a 3,5\nb 12,5\n"


# ----------------------------------------------------------------------------------------------------------------------


def results(decoding, without=()):
    """What ESPnet's command would leave: every key's own name as its text."""
    for job, output in enumerate(decoding.outputs, start=1):
        keys = [line.split()[0] for line in (decoding.folder / "logdir" / f"keys.{job}.scp").read_text().splitlines()]
        (output / "1best_recog").mkdir(parents=True)
        for name in MERGED:
            lines = [f"{key} {name} of {key}\n" for key in keys if key not in without]
            (output / "1best_recog" / name).write_text("".join(lines))


@pytest.fixture
def decoding(tmp_path):
    keys = ["b-2", "a-1", "c-10", "c-9", "d"]  # merged in this order, whatever it is
    (tmp_path / "wav.scp").write_text("".join(f"{key} {key}.flac\n" for key in keys))
    return plan(["python3", "-m", "x"], tmp_path / "decode.yaml", tmp_path / "wav.scp", tmp_path / "decode" / "set", 2)


def test_plan(decoding, tmp_path):
    assert decoding.keys == ["b-2", "a-1", "c-10", "c-9", "d"] and len(decoding.jobs) == 2
    assert decoding.jobs[1].command == [
        *("python3", "-m", "x", "--data_path_and_name_and_type", f"{tmp_path}/wav.scp,speech,sound"),
        *("--key_file", f"{tmp_path}/decode/set/logdir/keys.2.scp"),
        *("--output_dir", f"{tmp_path}/decode/set/logdir/output.2", "--config", f"{tmp_path}/decode.yaml"),
    ]


def test_merging_keeps_the_order(decoding):
    results(decoding)
    assert merge(decoding) == []
    for name in MERGED:
        wanted = [f"{key} {name} of {key}" for key in decoding.keys]
        assert (decoding.folder / name).read_text().splitlines() == wanted


@pytest.mark.parametrize("missing", ["b-2", "c-10", "d"])
def test_a_missing_utterance_leaves_an_empty_line(decoding, missing):
    results(decoding, without=[missing])
    assert merge(decoding) == [missing]
    lines = (decoding.folder / "text").read_text().splitlines()
    assert lines == [key if key == missing else f"{key} text of {key}" for key in decoding.keys]


def test_a_job_without_any_output_is_all_missing(decoding):
    assert merge(decoding) == decoding.keys


def test_planning_again_removes_the_last_results(decoding, tmp_path):
    results(decoding)
    merge(decoding)
    again = plan(["python3", "-m", "x"], None, tmp_path / "wav.scp", decoding.folder, 9)
    assert len(again.jobs) == 5 and not any((decoding.folder / name).exists() for name in MERGED)
    assert not any(output.exists() for output in again.outputs)


def test_log_follower_waits_for_whole_lines(tmp_path):
    log = tmp_path / "x.log"
    follower = LogFollower(log)
    assert follower.new_lines() == []
    log.write_text("one\ntw")
    assert follower.new_lines() == ["one"]
    log.write_text("one\ntwo\n")
    assert follower.new_lines() == ["two"]


def test_log_follower_reads_a_new_file_from_its_beginning(tmp_path):
    """ESPnet's launcher moves a log out of the way and begins another, which may soon be longer."""
    log = tmp_path / "x.log"
    log.write_text("old\n")
    follower = LogFollower(log)
    log.rename(tmp_path / "x.1.log")
    log.write_text("new one\nand more\n")
    assert follower.new_lines() == ["new one", "and more"]


def test_clock():
    assert [clock(s) for s in (0, 75.4, 4000)] == ["0:00", "1:15", "1:06:40"]
