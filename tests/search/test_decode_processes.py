"""The decode command's processes: what comes of the parts of a list, whatever ends the processes that decode them."""

import os
import signal
import sys
import threading
import time

import pytest
from tiny_experiment import table

from espnet_mega_plugin.decode.options import parsed
from espnet_mega_plugin.decode.processes import decode_in_processes

# Stands in for the interpreter of a part, which takes seconds to load torch: the key says what becomes of the utterance
PART = """\
import os, signal, sys, time
from pathlib import Path
given = dict(zip(sys.argv, sys.argv[1:]))
output, status = Path(given["--output_dir"]), 3
(output / "1best_recog").mkdir(parents=True)
for key in Path(given["--key_file"]).read_text().split():
    if key.startswith("raise"):
        raise KeyError("a mistake in the program")
    if key.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if key.startswith("sleep"):
        (output / "asleep").write_text(str(os.getpid()))
        time.sleep(60)
    if key.startswith("bad"):
        (output / "skipped").open("a").write(f"{key} is empty\\n")
    elif not key.startswith("lost"):
        status = 0
        (output / "1best_recog/token").open("a").write(f"{key} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
    print("done 1 0.5", flush=True)
sys.exit(status)
"""


@pytest.fixture
def decode(tmp_path, monkeypatch):
    """Decodes utterances of these names in processes."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable} -S\n{PART}")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def decode(names: str, *more: str) -> int:
        (tmp_path / "wav.scp").write_text("".join(f"{name} {name}.wav\n" for name in names.split()))
        data = ("--data_path_and_name_and_type", f"{tmp_path / 'wav.scp'},speech,sound")
        given = [*data, "--asr_model_file", "m.pth", "--output_dir", str(tmp_path / "out"), "--progress", "none", *more]
        return decode_in_processes(parsed(["--num_processes", "2", *given]), given)

    return decode


def test_the_parts_are_put_together_and_counted(decode, tmp_path, caplog):
    caplog.set_level("INFO", logger="espnet_mega_plugin")
    assert decode("a bad1 bad2 b c") == 0
    assert list(table(tmp_path / "out" / "1best_recog" / "token")) == ["a", "b", "c"]
    assert table(tmp_path / "out" / "skipped") == {"bad1": "is empty", "bad2": "is empty"}
    said = [record.getMessage() for record in caplog.records]
    assert said[:2] == ["Utterance bad1 is skipped: it is empty", "Utterance bad2 is skipped: it is empty"]
    assert said[2].startswith("5 utterances, 2.5 s of audio in ") and said[2].endswith("; 2 skipped")


def test_a_part_without_results_is_no_failure(decode, tmp_path):
    assert decode("bad1 bad2 a b") == 0
    assert list(table(tmp_path / "out" / "1best_recog" / "token")) == ["a", "b"]
    assert decode("bad1 bad2 bad3") == 3
    assert list(table(tmp_path / "out" / "skipped")) == ["bad1", "bad2", "bad3"]
    assert not (tmp_path / "out" / "1best_recog" / "token").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a b c raise", r"process 2 ended with status 1; the end of \S+decode\.2\.log:\n(.*\n)*KeyError: 'a mistake"),
        ("raise a b c", r"process 1 ended with status 1; the end of \S+decode\.1\.log:\n(.*\n)*KeyError: 'a mistake"),
        ("sleep a kill b", r"process 2 ended with status -9; the end of \S+decode\.2\.log"),
        ("a b c lost", "process 2 ended with status 0, but 1 of its 2 utterances have no result and no reason, as 'lost'"),
        ("lost bad a b", "process 1 ended with status 3, but 1 of its 2 utterances have no result"),
    ],
)  # fmt: skip
def test_a_part_that_fails_is_a_failure(decode, names, message):
    with pytest.raises(RuntimeError, match=message):
        decode(names)


def test_files_of_others_stay(decode, tmp_path):
    logs = tmp_path / "out" / "logdir"
    assert decode("a b c d e", "--num_processes", "5") == 0
    (logs / "output.1").mkdir()
    (logs / "decode.4.output").mkdir()
    for theirs in ("asr_inference.1.log", "keys.1.scp", "output.1/text"):
        (logs / theirs).write_text("theirs")
    assert decode("a b c d e") == 0
    ours = {f"decode.{n}.{kind}" for n in (1, 2) for kind in ("keys", "log")}
    assert {path.name for path in logs.iterdir()} == {"asr_inference.1.log", "keys.1.scp", "output.1", *ours}
    assert (logs / "output.1" / "text").read_text() == "theirs"


def test_each_process_sees_its_gpu(decode, tmp_path, monkeypatch):
    token = tmp_path / "out" / "1best_recog" / "token"
    assert decode("a b c d", "--ngpu", "2") == 0
    assert list(table(token).values()) == ["0", "0", "1", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert decode("a b", "--ngpu", "2") == 0
    assert list(table(token).values()) == ["5", "7"]
    for visible, seen in (("5", 1), ("", 0)):  # empty: hidden on purpose
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(ValueError, match=f"ngpu is 2, but CUDA_VISIBLE_DEVICES='{visible}' shows {seen}"):
            decode("a b", "--ngpu", "2")
    assert list(table(token).values()) == ["5", "7"]  # what is there is not touched before that is known


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_stops_the_parts_and_is_handled_as_before_afterwards(number, error, decode, tmp_path):
    before = signal.getsignal(number)
    asleep = [tmp_path / "out" / "logdir" / f"decode.{n}.output" / "asleep" for n in (1, 2)]

    def end_when_asleep():
        while not all(file.is_file() and file.read_text() for file in asleep):
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, number)

    threading.Thread(target=end_when_asleep, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(error) as left:
        decode("sleep1 sleep2")
    assert error is KeyboardInterrupt or left.value.code == 128 + number
    assert time.monotonic() - began < 30 and signal.getsignal(number) is before
    for file in asleep:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_it_works_in_any_thread(decode):
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(decode("a b")))
    thread.start()
    thread.join(60)
    assert statuses == [0]
