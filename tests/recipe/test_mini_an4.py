"""mini_an4: SPHERE files are read as they are, the archive is found or fetched, and only known names are written."""

import io
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import soundfile

from espnet_mega_plugin.recipe import mini_an4
from espnet_mega_plugin.recipe.kaldi_dir import validate
from espnet_mega_plugin.recipe.mini_an4 import IN_WHEEL, SETS, fetch, find_source, main, make, read_source
from espnet_mega_plugin.recipe.sphere import read_sphere

DATA_SH = Path(__file__).parents[2] / "egs" / "mini_an4" / "asr1" / "local" / "data.sh"

# Utterance of the corpus -> transcript line, part, samples; a stand-in with AN4's names and layout
TRAIN = {"an251-fash-b": "<s> YES </s>", "an152-mwhw-b": "<s> START </s>", "cen8-fbbh-b": "<s> MARCH third </s>"}
TEST = {"cen8-fcaw-b": "ELEVEN TWENTY SEVEN"}


def sphere(samples: np.ndarray, *, order: str = "<", **changes: str | None) -> bytes:
    """A SPHERE file; `changes` replace or remove (None) fields of the header."""
    fields = {
        "sample_count": f"-i {len(samples)}",
        "sample_rate": "-i 16000",
        "sample_n_bytes": "-i 2",
        "sample_byte_format": f"-s2 {'01' if order == '<' else '10'}",
        "channel_count": f"-i {1 if samples.ndim == 1 else samples.shape[1]}",
        "sample_coding": "-s3 pcm",
        "sample_checksum": f"-i {int(samples.sum(dtype=np.int64)) % 65536}",
        "sample_min": "-i 12345",  # wrong, as in AN4, and not looked at
    } | changes
    lines = ["NIST_1A", "   1024", *(f"{key} {value}" for key, value in fields.items() if value), "end_head", ""]
    return "\n".join(lines).encode().ljust(1024) + samples.astype(f"{order}i2").tobytes()


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-20000, 20000, shape).astype(np.int16)


def an4(**changes: bytes | None) -> dict[str, bytes]:
    """The files of the stand-in by name; `changes` replace or remove (None) a recording, by its session."""
    found = {
        "LICENSE": b"AN4 License Terms\n",
        "etc/an4_train.transcription": "".join(f"{words} ({name})\n" for name, words in TRAIN.items()).encode(),
        "etc/an4_test.transcription": "".join(f"{words} ({name})\n" for name, words in TEST.items()).encode(),
    }
    for number, name in enumerate([*TRAIN, *TEST]):
        folder = "an4_clstk" if name in TRAIN else "an4test_clstk"
        content = changes.get(name.split("-")[1], sphere(noise(number, 16000 + number)))
        if content is not None:
            found[f"wav/{folder}/{name.split('-')[1]}/{name}.sph"] = content
    return found


def archive(path: Path, files: dict[str, bytes], *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"downloads/an4/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def wheel(path: Path, content: bytes) -> Path:
    """A wheel that pip accepts as espnet 202611."""
    with zipfile.ZipFile(path / "espnet-202611-py3-none-any.whl", "w") as whl:
        whl.writestr(IN_WHEEL, content)
        whl.writestr("espnet-202611.dist-info/METADATA", "Metadata-Version: 2.1\nName: espnet\nVersion: 202611\n")
        whl.writestr("espnet-202611.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        whl.writestr("espnet-202611.dist-info/RECORD", "")
    return path / "espnet-202611-py3-none-any.whl"


@pytest.fixture
def source(tmp_path):
    return archive(tmp_path / "downloads.tar.gz", an4())


@pytest.fixture
def not_installed(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(mini_an4, "distribution", missing)


# SPHERE


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("shape", [(1,), (4801,), (797, 2)])
def test_samples_are_those_that_were_written_and_that_soundfile_reads(tmp_path, order, shape):
    samples = noise(7, *shape)
    content = sphere(samples, order=order)
    (tmp_path / "a.sph").write_bytes(content)
    for read, rate in (read_sphere(content, "a.sph"), soundfile.read(tmp_path / "a.sph", dtype="int16")):
        assert rate == 16000 and read.dtype == np.int16
        np.testing.assert_array_equal(read, samples)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a NIST SPHERE file"),
        (b"RIFF" + bytes(2000), "not a NIST SPHERE file, it begins with b'RIFF"),
        (sphere(noise(1, 100))[:1100], "promises 200 bytes of samples, the file has 76"),
        (sphere(noise(1, 100)) + b"\0\0", "promises 200 bytes of samples, the file has 202"),
        (sphere(noise(1, 100))[:300].replace(b"end_head", b"end_hea_"), "no end_head within the first 1024 bytes"),
        (sphere(noise(1, 100), sample_count=None), "header lacks sample_count"),
        (sphere(noise(1, 100), sample_count="-i many"), "sample_count in the SPHERE header should be a number.*'many'"),
        (sphere(noise(1, 100), sample_count="-i -100"), "must be positive, got -100, 1, 16000"),
        (sphere(noise(1, 100), sample_rate="-i 0"), "must be positive, got 100, 1, 0"),
        (sphere(noise(1, 100), sample_rate="16000"), "cannot read the SPHERE header's line 'sample_rate 16000'"),
        (sphere(noise(1, 100), sample_coding="-s4 ulaw"), "expected 16-bit PCM.*'ulaw'.*sph2pipe"),
        (sphere(noise(1, 100), sample_coding="-s26 pcm,embedded-shorten-v2.00"), "embedded-shorten"),
        (sphere(noise(1, 100), sample_n_bytes="-i 1"), "1 bytes a sample"),
        (sphere(noise(1, 100), sample_byte_format="-s2 11"), "byte format '11'"),
        (sphere(noise(1, 100), sample_checksum="-i 1"), "checksum is 1; the file is damaged"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(content, message):
    with pytest.raises(ValueError, match=f"^speech.sph: .*{message}"):
        read_sphere(content, "speech.sph")


# The data


def test_sets_names_and_transcripts_are_those_of_espnets_recipe(tmp_path, source):
    assert make(tmp_path / "data", source=source) == []
    texts = {name: dict(validate(tmp_path / "data" / name).text) for name in SETS}
    assert texts == {
        "train_dev": {"fash-an251-b": "YES"},  # the first of the training utterances
        "train_nodev": {"fbbh-cen8-b": "MARCH THIRD", "mwhw-an152-b": "START"},
        "test": {"fcaw-cen8-b": "ELEVEN TWENTY SEVEN"},
    }
    assert dict(validate(tmp_path / "data" / "train_nodev").speaker) == {"fbbh-cen8-b": "fbbh", "mwhw-an152-b": "mwhw"}
    assert (tmp_path / "data" / "LICENSE.an4").read_bytes() == an4()["LICENSE"]
    samples, rate = soundfile.read(tmp_path / "data" / "test" / "wav" / "fcaw-cen8-b.wav", dtype="int16")
    assert rate == 16000
    np.testing.assert_array_equal(samples, noise(3, 16003))


def test_archive_folder_and_wheel_give_the_same(tmp_path, source):
    with tarfile.open(source) as tar:
        for member in tar:
            path = tmp_path / "extracted" / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(member).read())
    extracted = tmp_path / "extracted"
    places = [extracted, extracted / "downloads", extracted / "downloads" / "an4"]
    for place in [source, wheel(tmp_path, source.read_bytes()), *places]:
        assert read_source(place) == an4(), place


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (sphere(noise(1, 100))[:1100], "cen8-fbbh-b.sph: the header promises 200 bytes"),
        (sphere(noise(1, 100), sample_rate="-i 8000"), "expected 16000 Hz and 1 channel, got 8000 Hz and 1 channels"),
        (sphere(noise(1, 100, 2)), "got 16000 Hz and 2 channels"),
        (None, "cen8-fbbh-b.sph: there is a transcript and no recording"),
    ],
)
def test_a_bad_recording_is_reported_and_the_others_are_kept(tmp_path, content, message):
    left_out = make(tmp_path / "data", source=archive(tmp_path / "a.tar.gz", an4(fbbh=content)))
    assert len(left_out) == 1 and message in left_out[0]
    assert list(validate(tmp_path / "data" / "train_nodev").text) == ["mwhw-an152-b"]
    assert list(validate(tmp_path / "data" / "train_dev").text) == ["fash-an251-b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"<s> NO </s>", "got the transcript '<s> NO </s>'"),
        (b"<s> NO </s> (an1-../../x-b)", "expected '<s> WORDS </s> .session-speaker-take.'"),
        (b"YES (an251-fash-b)", "fash-an251-b: appears twice"),
    ],
)
def test_a_bad_transcript_is_reported_and_the_others_are_kept(tmp_path, line, message):
    files = an4()
    files["etc/an4_train.transcription"] += line + b"\n"
    left_out = make(tmp_path / "data", source=archive(tmp_path / "a.tar.gz", files))
    assert len(left_out) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(left_out[0])
    assert len(validate(tmp_path / "data" / "train_nodev")) == 2


def test_a_source_without_usable_recordings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got 3 and 0. Left out: .*cen8-fcaw-b.sph: there is a transcript"):
        make(tmp_path / "data", source=archive(tmp_path / "a.tar.gz", an4(fcaw=None)))
    files = {name: content for name, content in an4().items() if not name.startswith("etc")}
    with pytest.raises(ValueError, match="AN4 without etc/an4_train.transcription"):
        make(tmp_path / "data", source=archive(tmp_path / "a.tar.gz", files))
    assert not (tmp_path / "data").exists()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
    return made


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil"),
        member("downloads/an4/../../../evil"),
        member("/tmp/evil"),
        member("downloads/an4/wav/link", tarfile.SYMTYPE, "/etc"),
        member("downloads/an4/wav/link", tarfile.LNKTYPE, "../../evil"),
        member("downloads/an4/device", tarfile.CHRTYPE),
    ],
    ids=lambda made: f"{made.name}-{made.type.decode()}",
)
def test_an_archive_that_points_outside_is_refused(tmp_path, evil):
    with pytest.raises(ValueError, match="a.tar.gz: .* is a link or points outside the archive; refused"):
        make(tmp_path / "data", source=archive(tmp_path / "a.tar.gz", an4(), evil))
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_what_is_not_an4_is_refused(tmp_path, source):
    cases = {
        "text.tar.gz": (b"hello", "cannot be read as a .tar.gz archive or a wheel"),
        "cut.tar.gz": (source.read_bytes()[:2000], "cannot be read as a .tar.gz archive or a wheel"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            read_source(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "old.whl", "w") as whl:
        whl.writestr("espnet/version.txt", "202511")
    with pytest.raises(ValueError, match="old.whl: has no egs3/mini_an4/.*from 202611 on"):
        read_source(tmp_path / "old.whl")
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.addfile(member("speech.txt"), io.BytesIO(b"four"))
    with pytest.raises(ValueError, match="other.tar: has no folder an4"):
        read_source(tmp_path / "other.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: neither is nor holds AN4's folder"):
        read_source(tmp_path / "empty")


# Where it comes from


def test_the_path_given_comes_first_then_the_installed_espnet_then_what_was_fetched(tmp_path, source, monkeypatch):
    given = archive(tmp_path / "given.tar.gz", an4())
    installed = archive(tmp_path / "installed.tar.gz", an4())

    class Espnet:
        def locate_file(self, name):
            assert name == IN_WHEEL
            return installed

    monkeypatch.setattr(mini_an4, "distribution", lambda name: Espnet())
    assert find_source(given, tmp_path) == given
    assert find_source(None, tmp_path) == installed
    installed.unlink()  # ESPnet 202511 is installed and has no such file
    assert find_source(None, tmp_path) == source


def test_nowhere_found_says_how_to_fetch(tmp_path, not_installed):
    with pytest.raises(FileNotFoundError, match="recipe.mini_an4 --fetch --downloads .*or name it with --source"):
        make(tmp_path / "data", downloads=tmp_path / "downloads")
    with pytest.raises(FileNotFoundError, match="--source nowhere.tar.gz: no such file or folder"):
        make(tmp_path / "data", source="nowhere.tar.gz")
    assert not list(tmp_path.iterdir())


def offline(monkeypatch, folder: Path) -> None:
    """Let pip look for packages in `folder` and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_fetch_keeps_the_archive_of_the_wheel_and_does_nothing_the_second_time(tmp_path, source, monkeypatch):
    (tmp_path / "shop").mkdir()
    wheel(tmp_path / "shop", source.read_bytes())
    offline(monkeypatch, tmp_path / "shop")
    fetched = fetch(tmp_path / "kept")
    assert fetched.read_bytes() == source.read_bytes()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["downloads.tar.gz"]
    (tmp_path / "shop" / "espnet-202611-py3-none-any.whl").unlink()
    assert fetch(tmp_path / "kept") == fetched


def test_a_fetch_that_fails_is_tried_again_and_then_says_what_pip_said(tmp_path, monkeypatch, caplog):
    (tmp_path / "shop").mkdir()
    offline(monkeypatch, tmp_path / "shop")
    monkeypatch.setattr(mini_an4.time, "sleep", lambda seconds: None)
    with pytest.raises(
        RuntimeError, match=r"(?s)pip download espnet==202611.*failed 2 times.*No matching distribution"
    ):
        fetch(tmp_path / "kept", attempts=2)
    assert caplog.text.count("to download espnet==202611 failed") == 2
    assert not (tmp_path / "kept").exists()


def test_fetch_and_make_in_one_command(tmp_path, source, monkeypatch, not_installed, capsys):
    (tmp_path / "shop").mkdir()
    wheel(tmp_path / "shop", source.read_bytes())
    offline(monkeypatch, tmp_path / "shop")
    main(["--out", str(tmp_path / "data"), "--downloads", str(tmp_path / "kept"), "--fetch"])
    assert "train_nodev    2 utterances    3 words" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # a wrong --source is not mended by fetching something else
        main(["--out", str(tmp_path / "data"), "--source", "nowhere", "--fetch"])
    assert capsys.readouterr().err == "error: --source nowhere: no such file or folder\n"
    with pytest.raises(SystemExit):
        main([])
    assert "nothing to do: give --out" in capsys.readouterr().err


def test_the_stage_makes_the_data(tmp_path, source):
    environment = {**os.environ, "PYTHONPATH": str(Path(mini_an4.__file__).parents[2])}
    command = [str(DATA_SH), "--python", sys.executable, "--source", str(source)]
    for _ in range(2):  # safe to repeat
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "mini_an4 made:" in done.stdout and "(0 utterances left out)" in done.stdout
    assert {name: len(validate(tmp_path / "data" / name)) for name in SETS} == {
        "train_nodev": 2,
        "train_dev": 1,
        "test": 1,
    }


# CMU's own recordings, where they are


@pytest.fixture(scope="module")
def cmu():
    try:
        return find_source()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_the_real_recordings_have_the_lengths_that_their_headers_tell(cmu, tmp_path):
    assert make(tmp_path, source=cmu) == []
    found = {}
    for name in SETS:
        for utterance, path in validate(tmp_path / name).wav.items():
            found[utterance] = soundfile.info(path).frames
    assert found == {  # the headers' sample_count
        "fash-an251-b": 16000,
        "fash-an253-b": 11200,
        "fbbh-cen8-b": 44800,
        "mwhw-an152-b": 16000,
        "mwhw-cen8-b": 35200,
        "fcaw-cen8-b": 46400,
        "mmxg-cen8-b": 36800,
    }
    texts = {name: dict(validate(tmp_path / name).text) for name in SETS}
    assert texts["train_dev"] == {"fash-an251-b": "YES"}
    assert texts["test"] == {
        "fcaw-cen8-b": "ELEVEN TWENTY SEVEN FIFTY SEVEN",
        "mmxg-cen8-b": "OCTOBER TWENTY FOUR NINETEEN SEVENTY",
    }


def test_the_real_recordings_are_what_soundfile_reads(cmu, tmp_path):
    recordings = {name: content for name, content in read_source(cmu).items() if name.endswith(".sph")}
    assert len(recordings) == 8
    for name, content in recordings.items():
        (tmp_path / "a.sph").write_bytes(content)
        samples, rate = read_sphere(content, name)
        oracle, oracle_rate = soundfile.read(tmp_path / "a.sph", dtype="int16")
        assert rate == oracle_rate == 16000
        np.testing.assert_array_equal(samples, oracle)
        first = struct.unpack("<4h", content[1024:1032])  # AN4 has the low byte first
        assert tuple(samples[:4]) == first
