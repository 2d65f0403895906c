"""Stage 11: what is shown of ESPnet's log, and which trainings are resumed."""

import shutil
import sys

import pytest
import torch
import yaml

from espnet_mega_plugin.recipe.resume import all_logs, back_up, check_same_model, mend, only_training
from espnet_mega_plugin.recipe.train import Watcher, run_training

# Lines as both versions of ESPnet write them, shortened where nothing is read
LOG = """\
[vm] 2026-11-22 15:35:50 (trainer:336) INFO: 3/5epoch started
[vm] 2026-11-22 15:35:51 (trainer:811) INFO: 3epoch:train:1-10batch: iter_time=0.024, forward_time=1.2, loss=263.613, loss_transducer=221.856, grad_norm=396.9, loss_scale=1.000
[vm] 2026-11-22 15:35:52 (trainer:394) INFO: 3epoch results: [train] iter_time=0.009, loss=172.193, loss_transducer=136.6, time=1 minute and 40.1 seconds, total_count=55, [valid] loss=112.684, loss_transducer=82.698, time=12.53 seconds, total_count=4
[vm] 2026-11-22 15:35:53 (trainer:462) INFO: The best model has been updated: valid.loss
[vm] 2026-11-22 15:35:53 (trainer:324) INFO: 4/5epoch started. Estimated time to finish: 1 minute and 52.72 seconds
[vm] 2026-11-22 15:35:54 (trainer:394) INFO: 4epoch results: [train] loss=1.720e+03, time=1 minute, [valid] loss=nan, time=1 second
[vm] 2026-11-22 15:35:53 (trainer:460) INFO: There are no improvements in this epoch
"""


class Screen:
    def __init__(self):
        self.shown, self.kept = [], []

    def show(self, text):
        self.shown.append(text)

    def keep(self, text):
        self.kept.append(" ".join(text.split()))


def test_a_line_an_epoch():
    screen, clock = Screen(), iter([0, 10, 10, 40, 40, 40, 60, 60])
    watcher = Watcher(screen, now=lambda: next(clock))
    for line in LOG.splitlines():
        watcher.see(line)
    assert screen.shown == ["epoch 3/5", "epoch 3/5: batch 10, loss 263.613", "epoch 4/5"]
    # The first epoch here is the third: it took 30 s, two are left. The second took 20 s: 25 s on average, one is left
    assert screen.kept == [
        "epoch 3/5 train loss 172.193 valid loss 112.684 30.0 s ETA 1:00",
        "epoch 4/5 train loss 1.720e+03 valid loss nan 20.0 s ETA 0:25",
    ]


def test_a_training_that_is_complete_says_so():
    screen = Screen()
    Watcher(screen).see("[vm] x (trainer:248) WARNING: The training has already reached at max_epoch: 21")
    assert screen.kept == ["the last epoch was trained already"]


def test_output_is_appended_to_the_log(tmp_path):
    command = [sys.executable, "-c", "import sys; print('said'); print('cried', file=sys.stderr); sys.exit(4)"]
    for _ in range(2):
        assert run_training(command, tmp_path / "exp") == 4
    lines = (tmp_path / "exp" / "train.log").read_text().splitlines()
    assert lines.count("said") == lines.count("cried") == 2


def test_a_launched_training_is_read_and_not_written(tmp_path, capsys):
    """The cluster's job writes train.log, anew; what the launcher says is kept apart."""
    exp = tmp_path / "exp"
    exp.mkdir()
    train_epoch(exp, 1)
    (tmp_path / "new.log").write_text(LOG)
    job = "import os, sys; os.rename(sys.argv[1], sys.argv[1] + '.old'); os.rename(sys.argv[2], sys.argv[1]); print('launched')"
    command = [sys.executable, "-c", job, str(exp / "train.log"), str(tmp_path / "new.log")]
    assert run_training(command, exp, launcher=True) == 0
    assert (exp / "train.log").read_text() == LOG and "launched" in (exp / "launch.log").read_text()
    assert "train loss  172.193" in capsys.readouterr().out


def test_two_trainings_do_not_share_an_experiment(tmp_path):
    with only_training(tmp_path / "exp"):
        with pytest.raises(BlockingIOError, match="another training is running in"):
            run_training(["true"], tmp_path / "exp")
    assert run_training(["true"], tmp_path / "exp") == 0


# ----------------------------------------------------------------------------------------------------------------------


def train_epoch(exp, epoch: int, *, files: bool = True) -> None:
    """What ESPnet leaves of an epoch: its results in the log, its files, and word that they are written."""
    with (exp / "train.log").open("a") as log:
        log.write(f"INFO: {epoch}epoch results: [train] loss=1\n")
        torch.save({"model": {"weight": torch.full((1000,), float(epoch))}, "epoch": epoch}, exp / "checkpoint.pth")
        if files:
            torch.save({"weight": torch.full((1000,), float(epoch))}, exp / f"{epoch}epoch.pth")
            log.write("INFO: There are no improvements in this epoch\n")


def resumed_epoch(exp) -> int:
    return torch.load(exp / "checkpoint.pth", weights_only=True)["epoch"]


def mended(exp) -> str:
    return mend(exp, exp / "train.log")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_torn_checkpoint_goes_back_to_the_last_whole_one(tmp_path, share):
    for epoch in (1, 2):
        train_epoch(tmp_path, epoch)
        back_up(tmp_path, tmp_path / "train.log")
    train_epoch(tmp_path, 3)  # killed before it was copied, while it wrote the fourth:
    whole = (tmp_path / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(whole[: int(share * len(whole))])
    assert mended(tmp_path).endswith("going on after epoch 2")
    assert resumed_epoch(tmp_path) == 2
    assert {path.name for path in tmp_path.glob("*epoch.pth")} == {"1epoch.pth", "2epoch.pth"}
    # and again, had it been killed right away
    (tmp_path / "checkpoint.pth").write_bytes(b"")
    assert mended(tmp_path) and resumed_epoch(tmp_path) == 2


def test_an_epoch_file_that_was_not_written_counts_as_torn(tmp_path):
    train_epoch(tmp_path, 1)
    back_up(tmp_path, tmp_path / "train.log")
    train_epoch(tmp_path, 2, files=False)
    (tmp_path / "2epoch.pth").write_bytes(b"torn")
    assert mended(tmp_path) and resumed_epoch(tmp_path) == 1
    assert not (tmp_path / "2epoch.pth").exists()


def test_a_torn_first_checkpoint_begins_anew(tmp_path):
    train_epoch(tmp_path, 1, files=False)
    (tmp_path / "checkpoint.pth").write_bytes(b"PK")
    assert mended(tmp_path).endswith("beginning anew")
    assert not list(tmp_path.glob("*.pth"))


def test_a_whole_state_is_left_alone(tmp_path):
    assert mended(tmp_path) == ""
    for epoch in (1, 2):
        train_epoch(tmp_path, epoch)
    assert mended(tmp_path) == "" and resumed_epoch(tmp_path) == 2


def test_logs_that_a_launcher_moved_belong_to_the_training(tmp_path):
    train_epoch(tmp_path, 1)
    (tmp_path / "train.log").rename(tmp_path / "train.2.log")
    train_epoch(tmp_path, 2)
    (tmp_path / "train.log").rename(tmp_path / "train.1.log")
    assert mended(tmp_path) == "" and resumed_epoch(tmp_path) == 2
    train_epoch(tmp_path, 3, files=False)
    assert mended(tmp_path).endswith("beginning anew")  # there was no backup
    for n, text in ((10, "ten\n"), (9, "nine\n")):
        (tmp_path / f"train.{n}.log").write_text(text)
    names = [path.name for path in all_logs(tmp_path / "train.log")]
    assert names == ["train.10.log", "train.9.log", "train.2.log", "train.1.log", "train.log"]


def test_a_copy_that_the_next_epoch_overtook_is_not_kept(tmp_path, monkeypatch):
    train_epoch(tmp_path, 1)
    back_up(tmp_path, tmp_path / "train.log")
    train_epoch(tmp_path, 2)
    copy = shutil.copyfile

    def slow_copy(source, target):
        train_epoch(tmp_path, 3)
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", slow_copy)
    back_up(tmp_path, tmp_path / "train.log")
    assert [path.name for path in tmp_path.glob("*.backup")] == ["checkpoint.epoch1.backup"]


def test_a_checkpoint_that_may_be_half_written_is_not_copied(tmp_path):
    train_epoch(tmp_path, 1)
    back_up(tmp_path, tmp_path / "train.log")
    train_epoch(tmp_path, 2, files=False)
    back_up(tmp_path, tmp_path / "train.log")
    assert [path.name for path in tmp_path.glob("*.backup")] == ["checkpoint.epoch1.backup"]


# ----------------------------------------------------------------------------------------------------------------------

CONFIG = {
    "decoder": "mega",
    "decoder_conf": {"block_size": 96, "num_blocks": 2},
    "encoder_conf": {"body_conf": [{"block_type": "conformer", "hidden_size": 96}]},
    "optim_conf": {"lr": "2e-3"},
    "max_epoch": 20,
    "patience": "none",
    "grad_clip": "none",
}


@pytest.fixture
def begun(tmp_path):
    """An experiment as ESPnet leaves it: all options with their defaults, numbers for text, None for none."""
    config = {
        **CONFIG,
        "decoder_conf": {"block_size": 96, "num_blocks": 2, "linear_size": 1024},
        "encoder_conf": {
            "body_conf": [{"block_type": "conformer", "hidden_size": 96, "input_size": 3}],
            "main_conf": {},
        },
        "optim_conf": {"lr": 0.002},
        "patience": None,
        "grad_clip": None,
        "use_amp": False,
        "seed": 0,
        "token_list": ["<blank>", "<unk>", "A", "<sos/eos>"],
    }
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "exp" / "checkpoint.pth").touch()
    (tmp_path / "tokens.txt").write_text("<blank>\n<unk>\nA\n<sos/eos>\n")

    def check(*command, **changes):
        (tmp_path / "train.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
        check_same_model(tmp_path / "train.yaml", tmp_path / "tokens.txt", tmp_path / "exp", command)

    return check


def test_the_same_configuration_resumes(begun):
    """What does not fit raises (the tests below)."""
    begun()
    begun(max_epoch=40, num_workers=3, keep_nbest_models=1)


def test_options_go_before_the_configuration(begun):
    """What --asr_args changed when the training began, it changes when it goes on."""
    options = [
        "--decoder",
        "mega",
        "--optim_conf",
        "lr=2e-3",
        "--use_amp",
        "false",
        "--seed",
        "7",
        "--grad_clip",
        "none",
    ]
    begun(*options, decoder="rnn", optim_conf={"lr": 0.1}, use_amp=True, grad_clip=3.0)
    with pytest.raises(ValueError, match="optim_conf.lr was 0.002, is now 0.1"):
        begun("--optim_conf", "lr=2e-3", "--optim_conf", "lr=0.1")
    with pytest.raises(ValueError, match="decoder was mega, is now rnn"):
        begun("--decoder", "rnn")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": "rnn"}, "decoder was mega, is now rnn"),
        ({"decoder_conf": {"block_size": 128}}, "decoder_conf.block_size was 96, is now 128"),
        ({"encoder_conf": {"body_conf": [{"hidden_size": 64}]}}, r"encoder_conf.body_conf\[0\].hidden_size was 96"),
        ({"encoder_conf": {"body_conf": [{}, {}]}}, "encoder_conf.body_conf was"),
        ({"optim_conf": {"lr": "1e-3"}}, "optim_conf.lr was 0.002, is now 1e-3"),
        ({"scheduler": "warmuplr"}, "scheduler was None, is now warmuplr"),
        ({"seed": 1}, "seed was 0, is now 1"),
    ],
)
def test_another_configuration_is_refused(begun, changes, message):
    with pytest.raises(ValueError, match=message + ".*another name with --asr_tag, or remove"):
        begun(**changes)


def test_other_tokens_are_refused(begun, tmp_path):
    (tmp_path / "tokens.txt").write_text("<blank>\n<unk>\nB\n<sos/eos>\n")
    with pytest.raises(ValueError, match="was begun with something else: token_list"):
        begun()


def test_a_training_that_has_not_begun_may_be_anything(begun, tmp_path):
    (tmp_path / "exp" / "checkpoint.pth").unlink()
    begun(decoder="rnn")
