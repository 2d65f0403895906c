"""AN4, all of it: both of its forms give the same sets, from a path or a download; its YAMLs build."""

import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from served import served
from small_form import (
    BATCHED,
    PLAIN,
    TINY,
    copied,
    decoded,
    interrupted,
    run,
    run_together,
    same_words,
    scored,
    stages_done,
)
from test_mini_an4 import sphere
from tones import REPOSITORY, spoken

from espnet_mega_plugin.recipe.an4 import ARCHIVES, SITES, main, make, sites
from espnet_mega_plugin.recipe.kaldi_dir import read_data_dir, validate

# Utterance of the corpus -> its line's words; the test part has no <s>, as in AN4
TRAIN = {
    "an251-fash-b": "<s> A be </s>", "an253-fash-b": "<s> CO </s>", "cen1-fbbh-b": "<s> DI EK FU </s>",
    "an152-mwhw-b": "<s> FU A </s>", "cen8-mwhw-b": "<s> BE CO A </s>", "an36-mblw-b": "<s> EK DI </s>",
}  # fmt: skip
TEST = {"cen8-fcaw-b": "EK A BE", "an391-mjwl-b": "DI"}


def words(line: str) -> str:
    return line.removeprefix("<s> ").removesuffix(" </s>").upper()


def samples(line: str) -> np.ndarray:
    return (spoken(words(line)) * 32767).astype(np.int16)


def an4(folder: Path, form: str) -> Path:
    """The tree in the corpus' layout, on tones; returns the folder an4."""
    for part, wav, utterances in (("train", "an4_clstk", TRAIN), ("test", "an4test_clstk", TEST)):
        (folder / "an4" / "etc").mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{line} ({name})\n" for name, line in utterances.items())
        (folder / "an4" / "etc" / f"an4_{part}.transcription").write_text(lines)
        for name, line in utterances.items():
            path = folder / "an4" / "wav" / wav / name.split("-")[1] / f"{name}.{form}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sphere(samples(line)) if form == "sph" else samples(line).astype(">i2").tobytes())
    return folder / "an4"


def packed(root: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, "an4")
    return archive


def contents(out: Path) -> dict[str, dict]:
    """Set -> utterance -> (words, speaker, samples)."""
    found = {}
    for path in sorted(out.iterdir()):
        data = validate(path)
        read = {name: soundfile.read(wav, dtype="int16") for name, wav in data.wav.items()}
        assert all(rate == 16000 for _, rate in read.values())
        found[path.name] = {name: (data.text[name], data.speaker[name], read[name][0].tolist()) for name in data.wav}
    return found


EXPECTED = {
    "train_dev": ["fash-an251-b", "fash-an253-b"],  # the first two of the sorted names
    "train_nodev": ["fbbh-cen1-b", "mblw-an36-b", "mwhw-an152-b", "mwhw-cen8-b"],
    "test": ["fcaw-cen8-b", "mjwl-an391-b"],
}


@pytest.mark.parametrize("form", ARCHIVES)
@pytest.mark.parametrize("place", ["archive", "folder", "above"])
def test_sets_names_and_samples_are_those_of_the_corpus_in_every_form(tmp_path, form, place):
    root = an4(tmp_path / "corpus", form)
    source = {"archive": packed(root, tmp_path / "a.tar.gz"), "folder": root, "above": root.parent}[place]
    assert make(source, tmp_path / "data", dev=2) == []
    found = contents(tmp_path / "data")
    assert {name: sorted(utterances) for name, utterances in found.items()} == {
        k: sorted(v) for k, v in EXPECTED.items()
    }
    for name, line in {**TRAIN, **TEST}.items():
        session, speaker, take = name.split("-")
        utterance = f"{speaker}-{session}-{take}"
        got = next(utterances[utterance] for utterances in found.values() if utterance in utterances)
        assert got == (words(line), speaker, samples(line).tolist())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wav/an4_clstk/mwhw/an152-mwhw-b.sph", b"", "line 4: .*an152-mwhw-b.sph: not a NIST SPHERE file"),
        ("wav/an4_clstk/mwhw/an152-mwhw-b.sph", sphere(samples("A"), sample_rate="-i 8000"), "got 8000 Hz"),
        ("wav/an4_clstk/mwhw/an152-mwhw-b.sph", None, "line 4: there is no recording .*an152-mwhw-b.sph or .raw"),
    ],
)
def test_a_bad_recording_is_reported_with_its_line_and_the_others_are_kept(tmp_path, name, content, message):
    root = an4(tmp_path / "corpus", "sph")
    (root / name).write_bytes(content) if content is not None else (root / name).unlink()
    left_out = make(root, tmp_path / "data", dev=2)
    assert len(left_out) == 1
    with pytest.raises(ValueError, match=f"etc/an4_train.transcription, .*{message}"):
        raise ValueError(left_out[0])
    assert len(validate(tmp_path / "data" / "train_nodev")) == 3


def test_an_odd_number_of_bytes_is_no_raw_recording(tmp_path):
    root = an4(tmp_path / "corpus", "raw")
    path = root / "wav/an4_clstk/mwhw/an152-mwhw-b.raw"
    path.write_bytes(path.read_bytes()[:-1])
    assert "bytes are no 16-bit samples" in make(root, tmp_path / "data", dev=2)[0]


@pytest.mark.parametrize(
    ("line", "message"), [("NO", "got the transcript 'NO'"), ("NO (an251-fash-b)", "fash-an251-b appears a second")]
)
def test_a_bad_transcript_is_reported_with_its_line(tmp_path, line, message):
    root = an4(tmp_path / "corpus", "sph")
    with (root / "etc/an4_train.transcription").open("a") as file:
        file.write(f"\n{line}\n")
    (left_out,) = make(root, tmp_path / "data", dev=2)
    assert left_out.startswith("etc/an4_train.transcription, line 8: ") and message in left_out


def test_what_is_not_all_of_an4_is_refused(tmp_path):
    root = an4(tmp_path / "corpus", "sph")
    with pytest.raises(ValueError, match="needs more than 100 training utterances .*, got 6 and 2. Left out: none"):
        make(root, tmp_path / "data")
    archive = packed(root, tmp_path / "a.tar.gz")
    content = archive.read_bytes()
    for damaged in (content[:-1000], content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]):  # cut; another checksum
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match="a.tar.gz: cannot be read"):
            make(archive, tmp_path / "data", dev=2)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        make(tmp_path / "nowhere", tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "site").mkdir()
    for form, name in ARCHIVES.items():
        packed(an4(tmp_path / f"corpus_{form}", form), tmp_path / "site" / name)
    with served(tmp_path / "site") as running:
        yield running


def test_either_form_is_downloaded_once(tmp_path, site, capsys):
    options = ["--site", site.url, "--downloads", str(tmp_path / "down"), "--dev", "2"]
    main(["--out", str(tmp_path / "sph"), *options])
    assert "train_nodev     4 utterances; the corpus has 946\n" in capsys.readouterr().out
    main(["--out", str(tmp_path / "raw"), *options, "--form", "raw"])
    main(["--out", str(tmp_path / "raw"), *options, "--form", "raw"])
    assert [path for path, _ in site.requests] == ["/an4_sphere.tar.gz", "/an4_raw.bigendian.tar.gz"]
    assert contents(tmp_path / "sph") == contents(tmp_path / "raw")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--site", "mars"], "--site mars: expected one of cmu, espnet, or an address"),
        (["--form", "mp3"], "--form mp3: expected one of sph, raw"),
        (["--site", "URL/elsewhere"], "HTTP status 404 .*named with --an4 PATH"),
    ],
)
def test_bad_options_end_with_advice(tmp_path, site, capsys, options, message):
    options = [option.replace("URL", site.url) for option in options]
    with pytest.raises(SystemExit) as leave:
        main(["--out", str(tmp_path / "data"), "--downloads", str(tmp_path / "down"), *options])
    error = capsys.readouterr().err.replace("\n", " ")
    assert leave.value.code == 1 and error.startswith("error: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)


def test_sites():
    assert sites(None) == [SITES["cmu"], SITES["espnet"]] and sites("espnet") == [SITES["espnet"], SITES["cmu"]]


@pytest.mark.slow
def test_the_recipe_in_its_small_form(tmp_path, site):
    """Download to pack, with a tiny model: stopped by Ctrl-C in its training, and then as if it had not been."""
    folder = copied("an4", tmp_path)
    # Long enough to be interrupted, and so slow to learn that it still has words to say: the first thing learnt is blank
    arguments = "--max_epoch 2 --num_iters_per_epoch 20 --optim_conf lr=0.00001"
    arguments += " --model_conf report_cer=false --model_conf report_wer=false"
    small = [*shlex.split(TINY), "--asr_args", arguments, "--asr_exp", "exp/small"]
    log = interrupted(folder, "exp/small", *small, "--local_data_opts", f"--site {site.url} --dev 2")
    assert set(read_data_dir(folder / "dump/raw/train_dev").text) == set(EXPECTED["train_dev"])
    assert len(read_data_dir(folder / "dump/raw/train_nodev_sp")) == 3 * 4
    exp = folder / "exp" / "small"
    assert not (exp / "2epoch.pth").exists() and "2epoch results" not in log

    training = ["--stage", "11", "--stop_stage", "11"]
    output, _ = run_together((folder, [*small, *training]), (folder, [*small, *training, "--asr_exp", "exp/straight"]))
    assert stages_done(output) == [11] and "epoch   2/2 " in output and "epoch   1/2 " not in output
    for name in ("1epoch.pth", "2epoch.pth", "valid.loss.ave.pth"):
        once, twice = (torch.load(folder / "exp" / kind / name, weights_only=True) for kind in ("straight", "small"))
        torch.testing.assert_close(twice, once, rtol=0, atol=0)

    decoding = ["--stage", "12", "--stop_stage", "12"]
    run_together((folder, [*small, *decoding]), (folder, [*small, *decoding, "--batched", "true"]))
    run(folder, *small, "--stage", "13", "--stop_stage", "13", "--batched", "true")
    output = run(folder, *small, "--stage", "13", "--skip_packing", "false")
    assert stages_done(output) == [13, 14] and (exp / "small_valid.loss.ave.zip").exists()
    for test_set, (utterances, words) in {"train_dev": (2, 3), "test": (2, 4)}.items():
        plain, batched = (decoded(folder, exp, tag, test_set) for tag in (PLAIN, BATCHED))
        same_words(batched, plain)
        assert [scored(exp, tag, test_set) for tag in (PLAIN, BATCHED)] == [(utterances, words)] * 2


def test_the_yamls_differ_in_the_decoder_alone_and_build_through_espnets_task():
    from espnet2.tasks.asr_transducer import ASRTransducerTask

    paths = {name: REPOSITORY / "conf" / "an4" / f"train_{name}.yaml" for name in ("mega", "rnn")}
    configs = {name: yaml.safe_load(path.read_text()) for name, path in paths.items()}
    assert {key for key in configs["mega"] if configs["mega"][key] != configs["rnn"][key]} == {
        "decoder",
        "decoder_conf",
    }
    for path in paths.values():
        arguments = ["--config", str(path), "--token_type", "bpe", "--normalize", "none", "--output_dir", "exp"]
        args = ASRTransducerTask.get_parser().parse_args([*arguments, "--frontend_conf", "fs=16k"])
        args.token_list = ["<blank>", "<unk>", *map(str, range(27)), "<sos/eos>"]
        model = ASRTransducerTask.build_model(args)
        text = torch.randint(2, 29, (2, 5), dtype=torch.int32)
        loss, *_ = model(torch.randn(2, 8000), torch.tensor([8000, 6000]), text, torch.tensor([5, 3]))
        assert torch.isfinite(loss)
