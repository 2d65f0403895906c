"""An experiment as ESPnet's training leaves it, with random weights that make a search busy, and something to decode."""

from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from configurations import perturbed
from espnet2.tasks.asr_transducer import ASRTransducerTask
from espnet2.tasks.lm import LMTask

WORDS = ["ab", "ba", "abc", "cab", "d"]
TOKENS = ["<blank>", "<unk>", "<space>", "a", "b", "c", "d", "<sos/eos>"]
RATE, HOP, FACTOR = 16000, 128, 4
CONFORMER = {"block_type": "conformer", "hidden_size": 12, "linear_size": 16, "heads": 2, "conv_mod_kernel_size": 3}
DECODERS = {
    "mega": {"block_size": 12, "linear_size": 8, "qk_size": 4, "v_size": 8, "num_heads": 2, "num_blocks": 2},
    "rnn": {"embed_size": 8, "hidden_size": 8},
    "stateless": {"embed_size": 8},
}


def configuration(decoder: str = "mega", streaming: bool = False) -> dict:
    main = {"dynamic_chunk_training": True, "short_chunk_size": 4, "num_left_chunks": 1} if streaming else {}
    return {
        "token_list": TOKENS,
        "token_type": "char",
        "frontend_conf": {"fs": "16k", "n_fft": 256, "hop_length": HOP, "n_mels": 12},
        "specaug": None,
        "normalize": None if streaming else "utterance_mvn",
        "encoder_conf": {
            "main_conf": main,
            "input_conf": {"vgg_like": False, "conv_size": 4, "subsampling_factor": FACTOR},
            "body_conf": [{**CONFORMER, "num_blocks": 2}],
        },
        "decoder": decoder,
        "decoder_conf": DECODERS[decoder],
        "joint_network_conf": {"joint_space_size": 16},
        "init": None,
    }


def experiment(folder: Path, seed: int, **options) -> dict:
    """Writes config.yaml and model.pth as ESPnet does; gives the options that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    given = folder / "train.yaml"
    given.write_text(yaml.safe_dump(configuration(**options)))
    args = ASRTransducerTask.get_parser().parse_args(["--config", str(given), "--output_dir", str(folder)])
    torch.manual_seed(seed)
    model = perturbed(ASRTransducerTask.build_model(args)).eval()
    enliven(model)
    (folder / "config.yaml").write_text(yaml.safe_dump(vars(args)))
    torch.save(model.state_dict(), folder / "model.pth")
    return {"asr_train_config": str(folder / "config.yaml"), "asr_model_file": str(folder / "model.pth")}


@torch.no_grad()
def enliven(model: torch.nn.Module) -> None:
    """Random weights make every frame alike: now frames differ, labels follow from labels, two in three are blank."""
    encoder, joint = model.encoder, model.joint_network
    dynamic, encoder.dynamic_chunk_training = encoder.dynamic_chunk_training, False
    speech = (torch.from_numpy(waveform(0.6, seed))[None] for seed in (*range(50, 56), *range(100, 106)))
    frames = torch.cat([model.encode(one, torch.tensor([one.shape[1]]))[0][0] for one in speech])
    encoder.dynamic_chunk_training = dynamic
    joint.lin_enc.weight.mul_(1.5 / (frames @ joint.lin_enc.weight.T).std(0)[:, None])
    joint.lin_enc.bias.copy_(-(frames @ joint.lin_enc.weight.T).mean(0))
    joint.lin_out.weight.mul_(4)
    joint.lin_out.bias[[1, len(TOKENS) - 1]] = -20.0
    logits = joint(frames, model.decoder(torch.zeros(1, 1, dtype=torch.long))[0])
    joint.lin_out.bias[0] += (logits[:, 1:].amax(1) - logits[:, 0]).quantile(0.6)


def language_model(folder: Path, seed: int) -> dict:
    """An LSTM language model as ESPnet's training leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "token_list": TOKENS,
        "token_type": "char",
        "lm": "seq_rnn",
        "lm_conf": {"unit": 8, "nlayers": 1},
        "init": None,
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    args = LMTask.get_parser().parse_args(["--config", str(folder / "train.yaml"), "--output_dir", str(folder)])
    torch.manual_seed(seed)
    model = LMTask.build_model(args)
    (folder / "config.yaml").write_text(yaml.safe_dump(vars(args)))
    torch.save(model.state_dict(), folder / "lm.pth")
    return {"lm_train_config": str(folder / "config.yaml"), "lm_file": str(folder / "lm.pth")}


def waveform(seconds: float, seed: int) -> np.ndarray:
    """Noise whose colour and loudness change every tenth of a second."""
    random = np.random.default_rng(seed)
    pieces = []
    for _ in range(int(np.ceil(seconds * 10))):
        noise = random.standard_normal(RATE // 10 + 40)
        length = int(random.integers(1, 40))
        coloured = np.convolve(noise, np.ones(length) / length, "valid")[: RATE // 10]
        pieces.append(coloured * 10 ** random.uniform(-2, -0.7))
    return np.concatenate(pieces)[: int(seconds * RATE)].astype(np.float32).clip(-1, 1)


def audio(folder: Path, seconds: list[float], seed: int) -> Path:
    """WAV files and their wav.scp, in an order that is not that of their lengths or names."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "wav.scp").open("w") as scp:
        for i, length in enumerate(seconds):
            key = f"utt{(7 * i + 3) % 100:02}"
            soundfile.write(folder / f"{key}.wav", waveform(length, seed + i), RATE, subtype="PCM_16")
            scp.write(f"{key} {folder / key}.wav\n")
    return folder / "wav.scp"


def table(file: Path) -> dict[str, str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return {key: value for key, _, value in (line.partition(" ") for line in lines)}
