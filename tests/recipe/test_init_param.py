"""--init_param: training starts from ESPnet's MEGA checkpoints as they are, and from the encoder of another model."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from espnet2.tasks.asr_transducer import ASRTransducerTask
from test_options import CONFIG, write_data

MEGA = {"block_size": 16, "linear_size": 24, "qk_size": 8, "v_size": 16, "num_heads": 2, "num_blocks": 2}
RNN = {"rnn_type": "lstm", "embed_size": 16, "hidden_size": 16}


@pytest.fixture
def config(tmp_path):
    """The YAML of a few steps; `config(decoder, options)` writes it."""
    data = write_data(tmp_path)

    def write(decoder: str, options: dict) -> str:
        path = tmp_path / f"{decoder}.yaml"
        encoder = {**CONFIG["encoder_conf"], "main_conf": {}}  # chunks of a random size would make the loss random
        model = {
            **CONFIG,
            "encoder_conf": encoder,
            "decoder": decoder,
            "decoder_conf": options,
            "num_iters_per_epoch": 2,
            **data,
        }
        path.write_text(yaml.safe_dump(model))
        return str(path)

    return write


def built(config: str) -> torch.nn.Module:
    """The model of a YAML, at other parameters than a training of it begins with."""
    torch.manual_seed(99)
    return ASRTransducerTask.build_model(ASRTransducerTask.get_parser().parse_args(["--config", config]))


def trained(config: str, folder, *options: str) -> SimpleNamespace:
    """What ESPnet's training saw first (`state`, `batch`, `loss`) and the parameters it ended with (`result`)."""
    seen = SimpleNamespace(loss=None)

    def before(model, args, kwargs):
        if seen.loss is None:
            seen.state = {name: value.clone() for name, value in model.state_dict().items()}
            seen.batch = {name: value.clone() for name, value in kwargs.items() if torch.is_tensor(value)}

    def after(model, args, out):
        seen.loss = seen.loss or out[0].item()

    class Task(ASRTransducerTask):
        @classmethod
        def build_model(cls, args):
            model = super().build_model(args)
            model.register_forward_pre_hook(before, with_kwargs=True)
            model.register_forward_hook(after)
            return model

    Task.main(cmd=["--config", config, "--ngpu", "0", "--output_dir", str(folder), "--seed", "1", *options])
    seen.result = torch.load(folder / "1epoch.pth", weights_only=True)
    return seen


def test_training_starts_from_a_checkpoint_of_espnets_mega(tmp_path, config):
    """Every parameter is the checkpoint's, and the first loss is what ESPnet's own class has on that batch."""
    theirs = built(config("mega_espnet", MEGA))
    assert type(theirs.decoder).__module__ == "espnet2.asr_transducer.decoder.mega_decoder"
    checkpoint = {name: value.clone() for name, value in theirs.state_dict().items()}
    torch.save(checkpoint, tmp_path / "espnet.pth")

    ours = trained(config("mega", MEGA), tmp_path / "exp", "--init_param", str(tmp_path / "espnet.pth"))
    assert ours.state.keys() == checkpoint.keys()
    for name, value in checkpoint.items():
        torch.testing.assert_close(ours.state[name], value, rtol=0, atol=0, msg=name)
    assert ours.loss == pytest.approx(theirs.train()(**ours.batch)[0].item(), rel=1e-5)
    moved = [name for name in checkpoint if not torch.equal(ours.result[name], checkpoint[name])]
    assert any(name.startswith("decoder.mega_blocks") for name in moved), moved


def test_the_encoder_comes_from_a_model_with_another_decoder(tmp_path, config):
    other = built(config("rnn", RNN)).state_dict()
    torch.save(other, tmp_path / "rnn.pth")
    plain = trained(config("mega", MEGA), tmp_path / "plain")
    ours = trained(config("mega", MEGA), tmp_path / "exp", "--init_param", f"{tmp_path / 'rnn.pth'}:encoder:encoder")
    assert {name for name in other if name.startswith("encoder.")} <= ours.state.keys()
    for name, value in ours.state.items():
        source = other if name.startswith("encoder.") else plain.state
        torch.testing.assert_close(value, source[name], rtol=0, atol=0, msg=name)
    assert not torch.equal(ours.state["encoder.embed.conv.0.weight"], plain.state["encoder.embed.conv.0.weight"])


def test_ignore_init_mismatch_takes_all_that_fits_of_another_model(tmp_path, config):
    other = built(config("rnn", RNN)).state_dict()
    torch.save(other, tmp_path / "rnn.pth")
    whole = ["--init_param", str(tmp_path / "rnn.pth")]
    with pytest.raises((RuntimeError, ValueError), match="decoder"):
        trained(config("mega", MEGA), tmp_path / "refused", *whole)
    ours = trained(config("mega", MEGA), tmp_path / "exp", *whole, "--ignore_init_mismatch", "true")
    for name, value in ours.state.items():
        fits = name in other and other[name].shape == value.shape
        assert fits == (not name.startswith("decoder.") or name == "decoder.embed.weight"), name
        if fits:
            torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=name)
