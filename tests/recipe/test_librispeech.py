"""LibriSpeech: its own layout becomes ESPnet's sets, from a path or a download; its YAMLs build what they say."""

import hashlib
import inspect
import shlex
import tarfile
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from served import served
from small_form import BATCHED, PLAIN, TINY, copied, decoded, run, run_together, same_words, scored, stages_done
from tones import REPOSITORY, spoken

from espnet_mega_plugin.recipe.kaldi_dir import read_data_dir, read_table, validate
from espnet_mega_plugin.recipe.librispeech import MIRRORS, PARTS, main, mirrors

# Part -> reader -> chapter -> what is read in it
CORPUS = {
    "train-clean-100": {
        "103": {"1240": ["A BE", "CO A DI"], "1241": ["FU"]},
        "1034": {"121119": ["EK CO", "BE FU A", "DI DI"]},
        "27": {"1": ["CO BE EK", "FU DI"]},
    },
    "dev-clean": {"84": {"121123": ["DI FU", "A BE CO"]}},
    "dev-other": {"116": {"288045": ["FU A"]}},
    "test-clean": {"61": {"70968": ["DI EK", "BE"]}},
    "test-other": {"367": {"130732": ["EK A BE"]}},
}
SPEAKERS = """; The fields: reader, sex, part, minutes, name
;ID  |SEX| SUBSET           |MINUTES| NAME
27   | M | train-clean-100  | 25.03 | A | name with a bar
61   | M | test-clean       | 8.08  | B
84   | F | dev-clean        | 8.02  | C
103  | F | train-clean-100  | 25.14 | D
116  | M | dev-other        | 8.02  | E
367  | F | test-other       | 8.04  | F
1034 | F | train-clean-100  | 25.14 | G
"""
YAMLS = sorted((REPOSITORY / "conf" / "librispeech_100").glob("train_*.yaml"))


def librispeech(folder: Path) -> Path:
    """The tree in the corpus' layout, on tones; returns the folder LibriSpeech."""
    root = folder / "LibriSpeech"
    for part, readers in CORPUS.items():
        for reader, chapters in readers.items():
            for chapter, sentences in chapters.items():
                place = root / part / reader / chapter
                place.mkdir(parents=True)
                names = [f"{reader}-{chapter}-{number:04}" for number in range(len(sentences))]
                for name, sentence in zip(names, sentences, strict=True):
                    soundfile.write(place / f"{name}.flac", spoken(sentence), 16000)
                lines = [f"{name} {sentence}\n" for name, sentence in zip(names, sentences, strict=True)]
                (place / f"{reader}-{chapter}.trans.txt").write_text("".join(lines))
    (root / "SPEAKERS.TXT").write_text(SPEAKERS)
    return root


def archives(root: Path, site: Path) -> Path:
    """Each part as the archive that openslr.org has of it; returns the list of their checksums."""
    site.mkdir()
    for part in PARTS:
        with tarfile.open(site / f"{part}.tar.gz", "w:gz") as tar:
            for name in ("SPEAKERS.TXT", part):
                tar.add(root / name, f"LibriSpeech/{name}")
    sums = site / "md5sum.txt"
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in site.glob("*.tar.gz")]
    sums.write_text("".join(lines))
    return sums


@pytest.fixture
def root(tmp_path):
    return librispeech(tmp_path / "corpora")


@pytest.fixture
def site(tmp_path, root, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    archives(root, tmp_path / "site")
    with served(tmp_path / "site") as running:
        yield running


def prepare(tmp_path, *options, capsys=None) -> str:
    """The message of the exit with which it ends; "" when it succeeds."""
    try:
        main(["--out", str(tmp_path / "data"), *map(str, options)])
    except SystemExit as leave:
        assert leave.code == 1
        return capsys.readouterr().err
    return ""


# From a path


def test_sets_names_and_speakers_are_those_of_espnets_recipe(tmp_path, root, capsys):
    assert prepare(tmp_path, "--librispeech", root) == ""
    texts = {path.name: dict(validate(path).text) for path in sorted((tmp_path / "data").iterdir())}
    dev_clean = {"84-121123-0000": "DI FU", "84-121123-0001": "A BE CO"}
    assert texts == {
        "train_clean_100": {
            "103-1240-0000": "A BE", "103-1240-0001": "CO A DI", "103-1241-0000": "FU", "1034-121119-0000": "EK CO",
            "1034-121119-0001": "BE FU A", "1034-121119-0002": "DI DI", "27-1-0000": "CO BE EK", "27-1-0001": "FU DI",
        },
        "dev_clean": dev_clean,
        "dev_other": {"116-288045-0000": "FU A"},
        "dev": {"116-288045-0000": "FU A", **dev_clean},
        "test_clean": {"61-70968-0000": "DI EK", "61-70968-0001": "BE"},
        "test_other": {"367-130732-0000": "EK A BE"},
    }  # fmt: skip
    assert read_table(tmp_path / "data" / "dev" / "spk2gender") == {"116-288045": "m", "84-121123": "f"}
    train = validate(tmp_path / "data" / "train_clean_100")
    assert set(train.by_speaker()) == {"103-1240", "103-1241", "1034-121119", "27-1"}
    assert Path(train.wav["27-1-0001"]) == root / "train-clean-100" / "27" / "1" / "27-1-0001.flac"
    shown = capsys.readouterr().out
    assert "train_clean_100      8 utterances; the corpus has 28539\n" in shown
    assert "dev                  3 utterances; the corpus has 5567\n" in shown


def test_the_folder_above_and_relative_paths_will_do(tmp_path, root, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare(tmp_path, "--librispeech", "corpora") == ""
    assert Path(validate(tmp_path / "data" / "test_other").wav["367-130732-0000"]).is_absolute()


def trans(root: Path) -> Path:
    return root / "train-clean-100" / "103" / "1240" / "103-1240.trans.txt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: trans(root).write_text("103-1240-0000 A BE\n103-1240-0001\n"),
         "103-1240.trans.txt, line 2: expected '103-1240-<number> WORDS', got '103-1240-0001'"),
        (lambda root: trans(root).write_text("103-1241-0000 A BE\n"),
         "103-1240.trans.txt, line 1: expected '103-1240-<number> WORDS'"),
        (lambda root: trans(root).write_text("103-1240-0000 A\n103-1240-0000 A\n"),
         "103-1240.trans.txt, line 2: '103-1240-0000' appears a second time"),
        (lambda root: trans(root).write_text("103-1240-0000 A BE\n"),
         "103/1240: 103-1240-0001 lacks a line in 103-1240.trans.txt; 1 such"),
        (lambda root: (trans(root).parent / "103-1240-0001.flac").unlink(),
         "103/1240: 103-1240-0001 lacks its recording; 1 such in this chapter. Extract the part anew"),
        (lambda root: (root / "SPEAKERS.TXT").write_text("61 | M | test-clean | 8 | B\nhello\n"),
         "SPEAKERS.TXT, line 2: expected 'reader | M or F | part | minutes | name', got 'hello'"),
        (lambda root: (root / "SPEAKERS.TXT").write_text(SPEAKERS.replace("1034 |", "1035 |")),
         "SPEAKERS.TXT: has no line for reader 1034"),
        (lambda root: (root / "dev-other").rename(root / "dev_other"),
         "has no dev-other; extract dev-other.tar.gz there"),
        (lambda root: (root / "SPEAKERS.TXT").unlink(), "neither it nor its LibriSpeech has SPEAKERS.TXT"),
    ],
)  # fmt: skip
def test_a_fault_in_the_corpus_is_told_with_its_place(tmp_path, root, capsys, change, message):
    change(root)
    error = prepare(tmp_path, "--librispeech", root, capsys=capsys)
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.glob("data/*/wav.scp"))


# From the web


def options(site, tmp_path, *more):
    return ["--mirror", site.url, "--checksums", site.folder / "md5sum.txt", "--downloads", tmp_path / "down", *more]


def test_download_and_path_give_the_same_and_nothing_is_fetched_twice(tmp_path, root, site):
    assert prepare(tmp_path, *options(site, tmp_path)) == ""
    assert [path for path, _ in site.requests] == [f"/{part}.tar.gz" for part in PARTS]
    fetched = {path.name: validate(path) for path in (tmp_path / "data").iterdir()}
    prepare(tmp_path, "--librispeech", root)
    for name, data in fetched.items():
        given = validate(tmp_path / "data" / name)
        assert (data.text, data.speaker) == (given.text, given.speaker)
        for utterance, path in data.wav.items():
            assert Path(path).read_bytes() == Path(given.wav[utterance]).read_bytes()
    for part in PARTS:
        (tmp_path / "down" / f"{part}.tar.gz").unlink()  # once extracted, the archives are not needed
    assert prepare(tmp_path, *options(site, tmp_path)) == "" and len(site.requests) == len(PARTS)


def test_an_extraction_that_was_interrupted_is_done_again(tmp_path, site):
    assert prepare(tmp_path, *options(site, tmp_path)) == ""
    part = tmp_path / "down" / "LibriSpeech" / "dev-clean"
    (part / ".extracted").unlink()
    next(part.rglob("*.flac")).write_bytes(b"half")
    assert prepare(tmp_path, *options(site, tmp_path)) == "" and len(site.requests) == len(PARTS)
    assert all(soundfile.info(path).frames for path in part.rglob("*.flac"))


def test_a_wrong_checksum_and_a_site_that_is_down_end_with_advice(tmp_path, site, capsys):
    (site.folder / "dev-clean.tar.gz").write_bytes(b"not what was promised")
    error = prepare(tmp_path, *options(site, tmp_path), capsys=capsys)
    assert "dev-clean.tar.gz could not be downloaded" in error and "its md5 is" in error
    assert not (tmp_path / "down" / "dev-clean.tar.gz").exists() and not (tmp_path / "data").exists()
    (site.folder / "dev-clean.tar.gz").unlink()
    error = prepare(tmp_path, *options(site, tmp_path), capsys=capsys)
    assert "HTTP status 404" in error and "An extracted corpus is named with --librispeech PATH.\n" in error


def test_an_archive_without_its_part_is_refused(tmp_path, site, capsys):
    first, second = (site.folder / f"{part}.tar.gz" for part in ("train-clean-100", "dev-clean"))
    first.write_bytes(second.read_bytes())
    sums = (site.folder / "md5sum.txt").read_text().splitlines()
    second_sum = next(line.split()[0] for line in sums if line.endswith("dev-clean.tar.gz"))
    (site.folder / "md5sum.txt").write_text(f"{second_sum}  train-clean-100.tar.gz\n")
    error = prepare(tmp_path, *options(site, tmp_path), capsys=capsys)
    assert "train-clean-100.tar.gz: has no LibriSpeech/train-clean-100 in it" in error
    first.unlink()
    (tmp_path / "down" / "train-clean-100.tar.gz").unlink()
    (site.folder / "md5sum.txt").write_text(f"{second_sum}  dev-clean.tar.gz\n")
    error = prepare(tmp_path, *options(site, tmp_path), capsys=capsys)
    assert "no checksum for train-clean-100.tar.gz; known are those of dev-clean.tar.gz" in error


def test_mirrors():
    assert mirrors(None)[0] == "https://www.openslr.org/resources/12"
    assert mirrors("cn")[0] == MIRRORS["cn"] and sorted(mirrors("cn")) == sorted(MIRRORS.values())
    assert mirrors("http://localhost:8000/12/") == ["http://localhost:8000/12"]
    with pytest.raises(ValueError, match="--mirror mars: expected one of openslr, "):
        mirrors("mars")


# The recipe


def small_streaming() -> dict:
    """The streaming YAML of E-Branchformer and MEGA, its layers made few and narrow, for a handful of utterances."""
    path = REPOSITORY / "conf" / "librispeech_100" / "train_ebranchformer_mega_streaming.yaml"
    config = yaml.safe_load(path.read_text())
    config["decoder_conf"] |= {"block_size": 16, "linear_size": 32, "qk_size": 8, "v_size": 16, "num_blocks": 1}
    config["encoder_conf"]["input_conf"]["conv_size"] = 8
    narrow = {"hidden_size": 16, "linear_size": 32, "heads": 2, "conv_mod_kernel_size": 7, "num_blocks": 2}
    config["encoder_conf"]["body_conf"][0] |= narrow
    config["joint_network_conf"]["joint_space_size"] = 16
    few = {"batch_type": "unsorted", "batch_size": 2, "accum_grad": 1, "num_workers": 0, "keep_nbest_models": 1}
    return config | few | {"use_tensorboard": False, "use_matplotlib": False}


@pytest.mark.slow
def test_the_recipe_in_its_small_form(tmp_path, site):
    """Download, broken off once, to the folder for a hub; decoded as a whole, in batches and as the audio comes in."""
    folder = copied("librispeech_100", tmp_path)
    (folder / "conf" / "small.yaml").write_text(yaml.safe_dump(small_streaming()))
    small = [*shlex.split(TINY), "--asr_config", "conf/small.yaml"]
    site.break_after = [5000]
    sums = site.folder / "md5sum.txt"
    output = run(folder, *small, "--stop_stage", "11", "--local_data_opts", f"--mirror {site.url} --checksums {sums}")
    assert stages_done(output) == [1, 2, 3, 4, 5, 10, 11]
    assert ("/train-clean-100.tar.gz", "bytes=5000-") in site.requests
    train = read_data_dir(folder / "dump/raw/train_clean_100_sp")
    assert len(train) == 3 * 8 and "sp0.9-27-1-0000" in train.wav
    for utterance in ("27-1-0000", "1034-121119-0002"):
        before = soundfile.read(next((folder / "downloads").rglob(f"{utterance}.flac")), dtype="int16")[0]
        assert (soundfile.read(folder / train.wav[utterance], dtype="int16")[0] == before).all()
    assert set(read_data_dir(folder / "dump/raw/dev").text) == {"84-121123-0000", "84-121123-0001", "116-288045-0000"}
    (exp,) = (folder / "exp").glob("asr_small_raw_en_bpe14*_sp")
    config = yaml.safe_load((exp / "config.yaml").read_text())
    assert config["decoder"] == "mega" and len(config["token_list"]) == 14

    ways = {
        PLAIN: [],
        BATCHED: ["--batched", "true"],
        "online": [
            "--inference_config", "conf/librispeech_100/decode_streaming.yaml", "--use_streaming", "true",
            "--inference_tag", "online", "--inference_args", "--decoding_window 320",
        ],
    }  # fmt: skip
    run_together(*((folder, [*small, *way, "--stage", "12", "--stop_stage", "12"]) for way in ways.values()))
    for tag in (BATCHED, "online"):
        run(folder, *small, *ways[tag], "--stage", "13", "--stop_stage", "13")
    last = ["--skip_packing", "false", "--skip_upload_hf", "false", "--hf_repo", "a/small", "--upload_dry_run", "true"]
    assert stages_done(run(folder, *small, "--stage", "13", *last)) == [13, 14, 15]
    assert (folder / "exp/hf_a_small/exp" / exp.name / "config.yaml").exists()
    for test_set, (utterances, words) in {"test_clean": (2, 3), "test_other": (1, 3), "dev_clean": (2, 5)}.items():
        same_words(decoded(folder, exp, BATCHED, test_set), decoded(folder, exp, PLAIN, test_set))
        decoded(folder, exp, "online", test_set)
        assert {scored(exp, tag, test_set) for tag in ways} == {(utterances, words)}
    log = (exp / "online/test_clean/logdir/asr_inference.1.log").read_text()
    assert "--streaming true" in log and "--decoding_window 320" in log


# The YAMLs


def test_every_yaml_differs_from_the_first_only_in_what_its_name_says():
    configs = {path.stem.removeprefix("train_"): yaml.safe_load(path.read_text()) for path in YAMLS}
    first = configs["ebranchformer_mega"]
    for name, config in configs.items():
        changed = {key for key in first.keys() | config.keys() if first.get(key) != config.get(key)}
        encoder, decoder, *rest = name.split("_")
        allowed = {"encoder_conf"} if encoder == "conformer" or "streaming" in rest else set()
        allowed |= {"decoder", "decoder_conf"} if decoder != "mega" else set()
        allowed |= {"batch_bins", "accum_grad"} if "8gpu" in rest else set()
        assert changed == allowed, name
        assert config["decoder"] == decoder and config["encoder_conf"]["body_conf"][0]["block_type"] == encoder
        assert config["batch_bins"] * config["accum_grad"] == 32_000_000
        assert bool(config["encoder_conf"]["main_conf"].get("dynamic_chunk_training")) == ("streaming" in rest)


def parsed(path: Path):
    from espnet2.tasks.asr_transducer import ASRTransducerTask

    arguments = ["--config", str(path), "--token_type", "bpe", "--normalize", "none", "--output_dir", "exp"]
    args = ASRTransducerTask.get_parser().parse_args([*arguments, "--frontend_conf", "fs=16k"])
    args.token_list = ["<blank>", "<unk>", *map(str, range(497)), "<sos/eos>"]
    return ASRTransducerTask, args


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_builds_through_espnets_task_and_has_a_loss(path):
    task, args = parsed(path)
    if args.decoder == "rwkv" and not torch.cuda.is_available():
        from espnet2.asr_transducer.decoder.rwkv_decoder import RWKVDecoder

        inspect.signature(RWKVDecoder).bind(500, **args.decoder_conf)
        pytest.skip("ESPnet compiles a CUDA kernel to build its RWKV decoder; its arguments fit")
    model = task.build_model(args)
    lengths = torch.tensor([8000, 6000])
    text = torch.randint(2, 499, (2, 5), dtype=torch.int32)
    model.train()
    loss, stats, _ = model(torch.randn(2, 8000), lengths, text, torch.tensor([5, 3]))
    assert torch.isfinite(loss) and torch.isfinite(stats["loss_aux_ctc"])
    assert "frames of 32 ms" in path.read_text()
    with torch.no_grad():
        assert 237 <= model.encoder.embed(torch.randn(1, 960, 80), None)[0].shape[1] <= 240  # 4 frames of 8 ms each


def decoding_options():
    from espnet2.bin.asr_transducer_inference import get_parser

    path = REPOSITORY / "conf" / "librispeech_100" / "decode_streaming.yaml"
    needed = ["--output_dir", "x", "--key_file", "x", "--data_path_and_name_and_type", "a,speech,sound"]
    return get_parser().parse_args(["--config", str(path), *needed])


@torch.no_grad()
@pytest.mark.parametrize(
    "path", [path for path in YAMLS if "rnn_streaming" in path.stem or "branchformer_mega_streaming" in path.stem],
    ids=lambda path: path.stem,
)  # fmt: skip
def test_decoding_in_chunks_gives_the_encoder_every_frame_of_the_whole(path):
    """ESPnet's own chunks, 960 ms each, through the input layer, against that of the whole recording."""
    from espnet2.asr_transducer.frontend.online_audio_processor import OnlineAudioProcessor

    task, args = parsed(path)
    args.encoder_conf["body_conf"][0]["num_blocks"] = 1  # the input layer stays as it is
    model, decoding = task.build_model(args).eval(), decoding_options()
    assert decoding.streaming and decoding.left_context == 120
    online = OnlineAudioProcessor(
        model._extract_feats, model.normalize, decoding.decoding_window, 4, args.frontend_conf, torch.device("cpu")
    )
    speech = torch.randn(4 * online.decoding_samples)
    parts = speech.split(online.decoding_samples)
    feats = [online.compute_features(part, n == len(parts))[0] for n, part in enumerate(parts, start=1)]
    chunks = [model.encoder.embed(part, None)[0][:, 1:-1] for part in feats]
    whole = model.encoder.embed(model._extract_feats(speech[None], torch.tensor([len(speech)]))[0], None)[0]
    assert [chunk.shape[1] for chunk in chunks[1:-1]] == [30, 30]
    got = torch.cat(chunks, dim=1)
    assert whole.shape[1] - got.shape[1] in (1, 2)  # the first and the last have no neighbour
    torch.testing.assert_close(got, whole[:, 1 : 1 + got.shape[1]], rtol=1e-4, atol=1e-5)
