"""Pictures show the network's own numbers, stand where ESPnet's stand, and cost nothing where nobody asks."""

import importlib
import importlib.util
import inspect
import math
import sys
from types import SimpleNamespace

import definition
import matplotlib.image
import pytest
import torch
import yaml
from configurations import CHOICES, build, random_labels
from espnet2.tasks.asr_transducer import ASRTransducerTask
from espnet2.train.reporter import Reporter
from espnet2.train.trainer import Trainer
from recipe.tones import corpus

from espnet_mega_plugin import attach
from espnet_mega_plugin.__main__ import main as command_line
from espnet_mega_plugin.pictures import command, trainer
from espnet_mega_plugin.pictures.figures import Places, attention_figure, by_reach, kernel_figure
from espnet_mega_plugin.pictures.weights import attention_weights, ema_kernels

OPTIONS = {
    **{name: values[0] for name, values in CHOICES.items()},
    "vocab_size": 7,
    "block_size": 8,
    "qk_size": 4,
    "v_size": 9,
    "num_heads": 2,
    "num_blocks": 2,
    "normalization_type": "layer_norm",
    "activation_type": "swish",
    "activation_args": {},
    "dropout_rate": 0.3,
    "att_dropout_rate": 0.3,
}
REACHES = {
    "full": {},
    "rotary": {"rel_pos_bias_type": "rotary"},
    "pre_norm": {"pre_norm": True, "truncation_length": 3},
    "chunks": {"chunk_size": 4},
    "window as a mask": {"attention_window": 6},
    "window in bands": {"attention_window": 3},
    "window of one": {"attention_window": 1},
}


def shares(x, weights, name, options):
    """What the definition attends to: softmax over the labels seen, row by row. (L, D) -> (L, L)"""
    L, D, S, E = len(x), x.shape[1], options["qk_size"], options["v_size"]
    if options["pre_norm"]:
        x = torch.stack(
            [
                torch.from_numpy(definition.normalised(row, weights, f"{name}.normalization", options))
                for row in x.numpy()
            ]
        )
    averaged = definition.averages(x.numpy(), [False] * L, weights, f"{name}.multihead_damped_ema", options)
    mixed = averaged @ weights[f"{name}.proj_mx.weight"].T + weights[f"{name}.proj_mx.bias"]
    z = definition.phi(mixed[:, D : D + S])
    query, key = (z * weights[f"{name}.qk_weight"][i] + weights[f"{name}.qk_bias"][i] for i in (0, 1))
    table = torch.zeros(L, L, dtype=torch.float64)
    for t in range(L):
        places = definition.seen_by(t, [False] * L, options)
        scores = [
            query[t] @ key[j] / math.sqrt(S) + definition.position_bias(t - j, weights, f"{name}.rel_pos_bias", options)
            for j in places
        ]
        table[t, places] = torch.tensor(scores, dtype=torch.float64).softmax(0)
    assert E == weights[f"{name}.proj_v.bias"].shape[0]
    return table


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
def test_attention_is_the_definitions(reach, seed):
    options = {**OPTIONS, **reach}
    network, labels = build(options, seed), random_labels(options, 1, 11)[0]
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    x = torch.stack([torch.from_numpy(weights["embed.weight"][label]) for label in labels])
    found = attention_weights(network, labels)
    assert len(found) == 2
    for number, table in enumerate(found):
        name = f"mega_blocks.{number}"
        torch.testing.assert_close(table, shares(x, weights, f"{name}.0", options).float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(table.sum(1), torch.ones(11))
        assert not table.triu(1).any() and bool((table >= 0).all())
        x = definition.mega_block(x.numpy(), [False] * 11, weights, f"{name}.0", options)
        x = torch.stack([torch.from_numpy(definition.feed_forward(row, weights, f"{name}.1", options)) for row in x])


@pytest.mark.parametrize("training", [False, True])
def test_asking_changes_no_number_and_leaves_nothing_behind(training, seed):
    network = build(OPTIONS, seed).train(training)
    labels = random_labels(OPTIONS, 3, 9)
    torch.manual_seed(seed)
    wanted = network(labels)
    seen = [table.clone() for table in attention_weights(network.eval(), labels[1].tolist())]
    network.train(training)
    torch.manual_seed(seed)
    assert torch.equal(network(labels), wanted)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())
    assert all(torch.equal(a, b) for a, b in zip(seen, attention_weights(network.eval(), labels[1]), strict=True))


@pytest.mark.parametrize("labels", [torch.zeros(1, 3, dtype=torch.long), [], [0.5, 1.0], [0, 99]])
def test_labels_that_are_none_are_refused(labels, seed):
    with pytest.raises((TypeError, ValueError), match=r"label"):
        attention_weights(build(OPTIONS, seed), labels)


@pytest.mark.parametrize("truncation_length", [None, 4])
def test_kernels_are_the_averages_answer_to_one_label(truncation_length, seed):
    network = build({**OPTIONS, "truncation_length": truncation_length}, seed)
    for (block, _), kernel in zip(network.mega_blocks, ema_kernels(network, 9), strict=True):
        weight, decay, project = block.multihead_damped_ema.coefficients()
        h, answers = weight.clone(), []  # the recurrence of mega/ema.py after a pulse at time 0
        for _ in range(9):
            answers.append((project * h).sum(1))
            h = decay * h
        wanted = torch.stack(answers, 1).float().detach()
        if truncation_length:
            wanted[:, truncation_length:] = 0
        torch.testing.assert_close(kernel, wanted)
        torch.testing.assert_close(
            kernel[:, : truncation_length or 9], block.multihead_damped_ema.kernel(9).float().detach()
        )


def test_the_figures_hold_the_numbers(seed):
    network = build({**OPTIONS, "num_blocks": 5}, seed)
    tables, kernels = attention_weights(network, [0, 3, 2, 5]), ema_kernels(network, 9)
    for figure, numbers in (
        (attention_figure(tables, list("abcd"), "$utt_1"), tables),
        (kernel_figure(kernels), kernels),
    ):
        panels = [panel for panel in figure.axes if panel.get_title().startswith("block")]
        assert [panel.get_title() for panel in panels] == [f"block {n}" for n in range(5)]
        for panel, wanted in zip(panels, numbers, strict=True):
            shown = torch.from_numpy(panel.images[0].get_array().data)
            if figure.get_suptitle() == "EMA kernels":
                order = by_reach(wanted)
                assert sorted(order.tolist()) == list(range(len(wanted)))
                wanted = wanted[order]
                reach = (wanted.abs() * torch.arange(9)).sum(1) / wanted.abs().sum(1)
                assert bool((reach.diff() >= -1e-5).all())
            assert torch.equal(shown, wanted)


# ---- in ESPnet's training -------------------------------------------------------------------------------------------

CONFIG = {
    "token_type": "word",
    "token_list": ["<blank>", "<unk>", "A", "BE", "CO", "DI", "<sos/eos>"],
    "frontend_conf": {"n_fft": 400, "hop_length": 400, "n_mels": 20},
    "normalize": None,
    "encoder_conf": {
        "input_conf": {"vgg_like": False, "conv_size": 4, "subsampling_factor": 4},
        "body_conf": [
            {"block_type": "conformer", "hidden_size": 8, "linear_size": 8, "heads": 2, "conv_mod_kernel_size": 3}
        ],
    },
    "decoder": "mega",
    "decoder_conf": {"block_size": 8, "linear_size": 8, "qk_size": 4, "v_size": 8, "num_heads": 2, "num_blocks": 2},
    "joint_network_conf": {"joint_space_size": 8},
    "max_epoch": 1,
    "batch_type": "unsorted",
    "batch_size": 2,
    "num_workers": 0,
    "best_model_criterion": [["valid", "loss", "min"]],
    "optim_conf": {"lr": 0.001},
}


def trained(folder, **options):
    """ESPnet's training command, as its task runs it; gives the experiment's folder."""
    data = folder / "data"
    if not data.exists():
        corpus(data, ["A BE", "CO DI A", "BE", "DI CO BE A"])
        (data / "shape").write_text("".join(f"{line.split()[0]} 16000\n" for line in (data / "text").open()))
    exp = folder / "exp"
    (folder / "train.yaml").write_text(yaml.safe_dump({**CONFIG, **options}))
    arguments = ["--config", folder / "train.yaml", "--output_dir", exp, "--ngpu", 0, "--use_preprocessor", "true"]
    for part in ("train", "valid"):
        for file, name, kind in (("wav.scp", "speech", "sound"), ("text", "text", "text")):
            arguments += [f"--{part}_data_path_and_name_and_type", f"{data / file},{name},{kind}"]
        arguments += [f"--{part}_shape_file", data / "shape"]
    ASRTransducerTask.main(cmd=[str(argument) for argument in arguments])
    return exp


def below(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("trained"), num_att_plot=1)


def test_training_draws_what_num_att_plot_asks_for(experiment):
    """ESPnet's own pictures, the curves, are there as well."""
    utterance = (experiment.parent / "data" / "text").read_text().split()[0]
    pictures = experiment / "att_ws"
    assert below(pictures) == {f"{utterance}/decoder.attention.1ep.png", "decoder.ema_kernels.1ep.png"}
    for path in pictures.rglob("*.png"):
        picture = matplotlib.image.imread(path)
        assert min(picture.shape[:2]) > 100 and picture[..., :3].std() > 0.05
    assert {"loss.png", "backward_time.png"} <= below(experiment / "images")
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(experiment / "tensorboard" / "train"), size_guidance={"images": 0}).Reload()
    assert set(board.Tags()["images"]) == {f"decoder.attention_{utterance}", "decoder.ema_kernels"}
    assert [image.step for image in board.Images("decoder.ema_kernels")] == [1]
    assert "loss" in board.Tags()["scalars"]


def test_training_draws_nothing_when_not_asked_and_learns_the_same(experiment, tmp_path):
    silent = trained(tmp_path, num_att_plot=0, use_tensorboard=False)
    assert not (silent / "att_ws").exists()
    weights = [torch.load(exp / "1epoch.pth", weights_only=True) for exp in (experiment, silent)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


class Other(torch.nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder


@pytest.mark.parametrize("mega", [True, False])
def test_only_mega_is_drawn(mega, tmp_path, seed):
    """ESPnet's own method, with a decoder in a model of one's own, which has no list of tokens."""
    model = Other(build(OPTIONS, seed) if mega else torch.nn.Linear(1, 1))
    reporter = Reporter()
    reporter.set_epoch(3)
    batch = {"text": torch.tensor([[1, 2]]), "text_lengths": torch.tensor([2])}
    options = Trainer.build_options(ASRTransducerTask.get_parser().parse_args(["--output_dir", "x"]))
    options.no_forward_run = not mega  # this model has no forward
    with reporter.observe("att_plot") as part:
        Trainer.plot_attention(
            model=model,
            output_dir=tmp_path,
            summary_writer=None,
            iterator=[(["u1"], batch)]
            if not mega
            else iter([(["u1"], batch), (["u2"], {"speech": torch.zeros(1, 2)})]),
            reporter=part,
            options=options,
        )
    assert below(tmp_path) == ({"u1/decoder.attention.3ep.png", "decoder.ema_kernels.3ep.png"} if mega else set())


def test_the_trainer_is_espnets_and_wrapped_once():
    method = vars(Trainer)["plot_attention"].__func__
    attach.attach()
    assert vars(Trainer)["plot_attention"].__func__ is method and method._espnet_mega_plugin
    assert ASRTransducerTask.trainer is Trainer  # DeepSpeed accepts no other
    theirs = inspect.unwrap(method)
    assert theirs.__module__ == "espnet2.train.trainer" and inspect.signature(method) == inspect.signature(theirs)


def test_attention_that_espnet_draws_is_drawn_too():
    kinds = importlib.import_module("espnet2.main_funcs.calculate_all_attentions")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert not trainer._espnet_draws(model)
    model.append(kinds.MultiHeadedAttention(1, 2, 0.0))
    assert trainer._espnet_draws(model)


# ---- from a checkpoint ----------------------------------------------------------------------------------------------


def test_the_command_draws_a_checkpoint_as_training_did(experiment, tmp_path, capsys):
    out = tmp_path / "pictures"
    where = ["--asr_exp", str(experiment), "--num_att_plot", "1", "--out", str(out)]
    assert command_line(["pictures", *where, "--checkpoint", "1epoch.pth"]) == 0
    files = {path: (experiment / "att_ws" / path.replace("1epoch", "1ep")) for path in below(out)}
    assert len(files) == 2 and capsys.readouterr().out.splitlines() == [str(out / path) for path in sorted(files)[::-1]]
    for path, theirs in files.items():
        assert (out / path).read_bytes() == theirs.read_bytes()  # the same picture, to the byte


def test_the_command_takes_other_checkpoints_and_texts(experiment, tmp_path):
    (tmp_path / "text").write_text("one A BE CO\ntwo NEVER HEARD\nthree DI\n")
    drawn = command.draw(experiment, text=tmp_path / "text", num_att_plot=2, out=tmp_path, length=5)
    names = [path.relative_to(tmp_path).as_posix() for path in drawn]
    assert names == [f"{name}/decoder.attention.valid.loss.ave.png" for name in ("one", "two")] + [
        "decoder.ema_kernels.valid.loss.ave.png"
    ]
    assert all(path.is_file() for path in drawn)
    weights = torch.load(experiment / "1epoch.pth")
    torch.save({"state_dict": {f"model.{name}": value for name, value in weights.items()}}, tmp_path / "last.ckpt")
    torch.save({"model": weights, "optimizers": []}, tmp_path / "checkpoint.pth")
    for name in ("last.ckpt", "checkpoint.pth"):
        (kernels,) = command.draw(experiment, checkpoint=tmp_path / name, num_att_plot=0, out=tmp_path, length=5)
        assert kernels == tmp_path / f"decoder.ema_kernels.{name.partition('.')[0]}.png" and kernels.is_file()


def test_the_command_says_what_is_missing(experiment, tmp_path, capsys):
    def refused(*arguments, exp=experiment):
        assert command.main(["--asr_exp", str(exp), "--out", str(tmp_path / "out"), *map(str, arguments)]) == 1
        return capsys.readouterr().err

    assert "has no config.yaml" in refused(exp=tmp_path)
    assert "has no 7epoch.pth; name one with --checkpoint" in refused("--checkpoint", "7epoch.pth")
    torch.save({"model": {}, "path": tmp_path}, tmp_path / "more.pth")
    assert "holds other things than weights; name a model" in refused("--checkpoint", tmp_path / "more.pth")
    assert "text nowhere: not here and not in a folder above" in refused("--text", "nowhere")
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "empty.pth")
    assert "holds no weights of a MEGA decoder" in refused("--checkpoint", tmp_path / "empty.pth")
    weights = torch.load(experiment / "1epoch.pth")
    torch.save({name: value for name, value in weights.items() if "final_norm" not in name}, tmp_path / "part.pth")
    assert "final_norm" in refused("--checkpoint", tmp_path / "part.pth")
    for decoder in ("rnn", None):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump({"decoder": decoder}))
        assert f"decoder: {decoder}; only a MEGA decoder" in refused(exp=tmp_path / "other")


# ---- in Lightning's training ----------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_the_callback_draws_the_first_utterances_after_each_validation(tmp_path, seed):
    from espnet_mega_plugin.pictures.callback import MegaPictures

    network = build({**OPTIONS, "block_size": 4}, seed).float()
    model = SimpleNamespace(decoder=network, token_list=list("_abcdef"))
    board = []
    logger = SimpleNamespace(experiment=SimpleNamespace(add_image=lambda tag, *_, **__: board.append(tag)))
    state = SimpleNamespace(is_global_zero=True, sanity_checking=False, current_epoch=4, loggers=[logger])
    module = SimpleNamespace(model=model)
    text = torch.tensor([[1, 2, -1], [3, 4, 5]])
    batch = (["u1", "u2"], {"text": text, "text_lengths": torch.tensor([2, 3])})
    for count, wanted in ((0, set()), (3, {"u1", "u2", "u3"})):
        callback = MegaPictures(tmp_path / str(count), count)
        callback._first = ["of a validation that was broken off"]
        callback.on_validation_start(state, module)
        callback.on_validation_batch_end(state, module, None, batch, 0)
        callback.on_validation_batch_end(state, module, None, (["u3", "u4"], batch[1]), 1)
        callback.on_validation_end(state, module)
        drawn = below(tmp_path / str(count)) if count else set()
        assert drawn == {f"att_ws/{u}/decoder.attention.5ep.png" for u in wanted} | (
            {"att_ws/decoder.ema_kernels.5ep.png"} if count else set()
        )
    assert set(board) == {"decoder.attention_u1", "decoder.attention_u2", "decoder.attention_u3", "decoder.ema_kernels"}
    module.model = SimpleNamespace(decoder=torch.nn.Linear(1, 1))
    callback.on_validation_batch_end(state, module, None, batch, 0)
    with pytest.raises(TypeError, match="MegaPictures draws MEGA decoders .* this model's is Linear"):
        callback.on_validation_end(state, module)


def test_a_picture_goes_where_it_is_asked_to_and_nowhere_else(tmp_path, monkeypatch):
    figure, logged = kernel_figure([torch.ones(2, 3)]), {}
    monkeypatch.chdir(tmp_path)
    Places("1ep").put(figure, "decoder.ema_kernels")
    assert not below(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(log=logged.update, Image=lambda pixels: pixels.shape))
    Places("1ep", wandb=True).put(figure, "decoder.attention", "u1")
    ((tag, shape),) = logged.items()
    assert tag == "attention plot/decoder.attention_u1" and shape[2] == 3 and not below(tmp_path)
