"""Runners in Kaldi's form: what they are asked, and Slurm's.

There is no cluster here, so `sbatch`, `srun` and `scancel` are small programs that run the batch scripts on this machine
and write down how they were called; everything before and after them is real.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_stand_in import calls, install
from tones import recipe

from espnet_mega_plugin.recipe.jobs import Job, JobFailed, parse_call, run_jobs
from espnet_mega_plugin.recipe.slurm import DEFAULT_CONFIG, job_script, most_threads, submission

REPOSITORY = Path(__file__).resolve().parents[2]
SLURM = str(REPOSITORY / "egs" / "TEMPLATE" / "asr1" / "utils" / "slurm.pl")
RUN = str(REPOSITORY / "egs" / "TEMPLATE" / "asr1" / "utils" / "run.pl")


@pytest.fixture(autouse=True)
def this_python(monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder to work in, with the stand-ins on PATH."""
    install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True)


def test_what_a_runner_is_asked():
    asked = parse_call("--gpu 2 --num-threads 4 JOB=2:5 a/b.JOB.log cmd --x JOB --y".split())
    assert asked.options == {"gpu": "2", "num_threads": "4"} and asked.word == "JOB"
    assert list(asked.numbers) == [2, 3, 4, 5]
    assert (asked.log, asked.command) == ("a/b.JOB.log", ["cmd", "--x", "JOB", "--y"])
    single = parse_call(["x.log", "cmd"])
    assert (single.word, list(single.numbers), single.log, single.command) == (None, [], "x.log", ["cmd"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpu", "option --gpu needs a value"),
        ("JOB=0:3 x.JOB.log cmd", "JOB=0:3: expected numbers from 1 on"),
        ("JOB=1:3 x.log cmd", "3 jobs need a log each, with JOB in its name"),
        ("JOB=1:3 x.JOB.log", "expected [--option value]... [JOB=1:4] log command..."),
        ("", "expected [--option value]..."),
    ],
)
def test_what_a_runner_refuses(words, message):
    with pytest.raises(ValueError) as refusal:
        parse_call(words.split())
    assert message in str(refusal.value)
    for runner in (RUN, SLURM):
        result = call(runner, *words.split())
        assert result.returncode == 1 and message in result.stderr


def test_options_become_those_of_the_settings():
    config = (
        "command sbatch --export=PATH # why\noption gpu=* -p gpu --gres=gpu:$0\noption gpu=0 -p cpu\noption mem=0\n"
    )
    config += "option mem=* --mem-per-cpu $0\ndefault gpu=0\n"
    base = ["sbatch", "--export=PATH"]
    assert submission(config, {}) == [*base, "-p", "cpu"]
    assert submission(config, {"gpu": "3", "mem": "0", "max_jobs_run": "2"}) == [*base, "-p", "gpu", "--gres=gpu:3"]
    assert submission(config, {"mem": "4G"}) == [*base, "-p", "cpu", "--mem-per-cpu", "4G"]
    with pytest.raises(
        ValueError, match=r"--time 1:0:0: no line 'option time=\*' in the settings; there are --gpu, --mem"
    ):
        submission(config, {"time": "1:0:0"})
    with pytest.raises(ValueError, match="not a line of a slurm.conf: 'partition=x'"):
        submission("partition=x", {})


def test_the_repositorys_settings_know_what_espnets_launcher_asks():
    asked = {"gpu": "2", "num_threads": "2", "num_nodes": "3", "name": "train", "mem": "4G", "time": "1:0:0"}
    for config in (DEFAULT_CONFIG, (REPOSITORY / "conf" / "slurm.conf").read_text()):
        words = submission(config, asked)
        for pair in (["--nodes", "3"], ["--job-name", "train"], ["--ntasks-per-node", "1"]):
            assert any(words[i : i + 2] == pair for i in range(len(words))), words
        assert "--gres=gpu:2" in words


@pytest.mark.parametrize("word", ["it's", 'a "b" $HOME `ls`', "", "JOBS JOB.x", "*", "\\n"])
def test_a_batch_script_gives_the_command_its_words(slurm, word):
    asked = parse_call(
        ["JOB=3:3", "log/x.JOB.log", sys.executable, "-c", "import sys; print(sys.argv[1:])", word, "JOB"]
    )
    (slurm / "job.sh").write_text(job_script(asked, slurm))
    subprocess.run(["bash", "job.sh"], env={**os.environ, "SLURM_ARRAY_TASK_ID": "3"}, check=True)
    said = (slurm / "log" / "x.3.log").read_text().splitlines()
    assert said[2] == str([word.replace("JOB.", "3."), "3"]) and said[-1].startswith("# Ended (code 0)")


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("--gpu 2 --num-threads 8 --num_threads 2 x.log cmd", "--gpu 2 --num_threads 8 x.log cmd"),
        ("--num_threads 2 --num_threads 16 JOB=1:2 x.JOB.log cmd", "--num_threads 16 JOB=1:2 x.JOB.log cmd"),
        ("--name x x.log cmd --num_threads 3 --num_threads 1", "--name x x.log cmd --num_threads 3 --num_threads 1"),
    ],
)
def test_the_most_threads_that_are_asked_for_count(given, asked):
    assert most_threads(given.split()) == asked.split()


def test_threads_are_a_number(slurm):
    result = call(SLURM, "--num_threads", "many", "x.log", "true")
    assert result.returncode == 1 and result.stderr == "slurm.pl: --num_threads many: expected a number\n"


# In place of ESPnet's training: its threads and the CPUs that Slurm gave it; all other modules are run as they are
TELLS = """#!/bin/bash
case "$*" in
    "-m espnet2.bin.asr_transducer_train "*) echo "threads ${OMP_NUM_THREADS:-} of ${SLURM_CPUS_PER_TASK:-1} CPUs" ;;
    *) exec python3 "$@" ;;
esac
"""


@pytest.mark.parametrize(
    ("options", "cpus", "told"),
    [
        ("", None, ["threads 1 of 1 CPUs"]),  # path.sh's
        ("--train_threads 6", "6", ["threads 6 of 6 CPUs"]),
        ("--train_threads 6 --ngpu 2", "12", ["threads 6 of 12 CPUs"]),  # two processes
        ("--train_threads 6 --num_nodes 2", "6", ["threads 6 of 6 CPUs"] * 2),
        ("--train_threads 6 --ngpu 2 --num_nodes 2", "12", ["threads 6 of 12 CPUs"] * 2),
    ],
)
def test_a_training_gets_its_threads_and_cpus_for_them(slurm, monkeypatch, options, cpus, told):
    """Through ESPnet's launcher, which asks for a CPU a GPU of its own accord where there are several machines."""
    folder = recipe(slurm, "--train_set train --valid_set dev --test_sets test --token_type char")
    stats = "exp/asr_stats_raw_char/train"
    for name in ("data/token_list/char/tokens.txt", f"{stats}/text_shape.char", f"{stats}/feats_stats.npz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "tells").write_text(TELLS)
    (folder / "tells").chmod(0o755)
    monkeypatch.setenv("cmd_backend", "slurm")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # that of the machine which submits
    words = ["--stage", "11", "--stop_stage", "11", "--asr_exp", "exp/x", "--python", "./tells", *options.split()]
    result = call(str(folder / "run.sh"), *words)
    assert result.returncode == 0, result.stdout + result.stderr
    log = (folder / "exp" / "x" / "train.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("threads")] == told
    [sbatch] = calls(slurm / "bin", "sbatch")
    assert (sbatch[sbatch.index("--cpus-per-task") + 1] if "--cpus-per-task" in sbatch else None) == cpus


def test_an_array_of_jobs(slurm):
    (slurm / "path.sh").write_text("export FROM_PATH_SH=sourced\n")
    words = [
        "--mem",
        "4G",
        "--max-jobs-run",
        "2",
        "JOB=1:3",
        "exp/log/x.JOB.log",
        "bash",
        "-c",
        'echo "$0 $FROM_PATH_SH"',
        "JOB",
    ]
    result = call(SLURM, *words)
    assert result.returncode == 0, result.stderr
    for n in (1, 2, 3):
        assert f"\n{n} sourced\n" in (slurm / "exp" / "log" / f"x.{n}.log").read_text()
    [sbatch] = calls(slurm / "bin", "sbatch")
    assert sbatch[:3] == ["--export=PATH", "--mem-per-cpu", "4G"] and sbatch[sbatch.index("--array") + 1] == "1-3%2"
    assert "--wait" in sbatch and sbatch[-1] == "exp/log/q/x.JOB.sh"


def test_a_failing_job_shows_the_end_of_its_log(slurm):
    command = ["bash", "-c", 'echo "I am $0"; [ $0 != 2 ]', "JOB"]
    result = call(SLURM, "JOB=1:3", "log/x.JOB.log", *command)
    assert result.returncode == 1 and "1 of 3 jobs failed" in result.stderr
    assert "end of log/x.2.log" in result.stderr and "I am 2" in result.stderr


def test_a_job_that_never_ran_is_a_failure(slurm):
    (slurm / "bin" / "sbatch").write_text("#!/bin/sh\necho 7\n")
    result = call(SLURM, "log/x.log", "true")
    assert result.returncode == 1 and "1 of 1 jobs failed" in result.stderr and "it was not written" in result.stderr


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.chdir(tmp_path)
    result = call(SLURM, "x.log", "true")
    assert result.returncode == 1 and "sbatch: no such command" in result.stderr


def test_who_stops_waiting_cancels(slurm):
    process = subprocess.Popen([SLURM, "log/x.log", "sleep", "60"])
    give_up = time.monotonic() + 30
    while not (slurm / "log" / "x.log").exists():
        assert time.monotonic() < give_up
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and calls(slurm / "bin", "scancel") == [["1"]]


def test_jobs_are_submitted_one_by_one(slurm):
    """As decoding does it: jobs of different commands, so many at a time."""
    jobs = [Job(["echo", f"number {n}"], Path("log") / f"{n}.log") for n in range(4)]
    run_jobs(jobs, 2, submit=[SLURM, "--mem", "2G"])
    assert all(f"\nnumber {n}\n" in (slurm / "log" / f"{n}.log").read_text() for n in range(4))
    assert sorted(shlex.join(words[1:3]) for words in calls(slurm / "bin", "sbatch")) == ["--mem-per-cpu 2G"] * 4
    with pytest.raises(JobFailed, match=r"end of log/x.log"):
        run_jobs([Job(["false"], Path("log/x.log"))], 1, submit=[SLURM])
