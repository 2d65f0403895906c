"""attention_window and pre_norm through ESPnet's own task and inference: training, then decoding whole and in parts."""

import editdistance
import numpy as np
import pytest
import torch
import yaml
from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer, Hypothesis
from espnet2.bin.asr_transducer_inference import Speech2Text
from espnet2.tasks.asr_transducer import ASRTransducerTask
from test_beam_search import ForwardOnly

FRAMES = 12  # of each spoken label
CONFIG = {
    "token_list": ["<blank>", "<unk>", "a", "b", "c", "<sos/eos>"],
    "token_type": "word",
    "input_size": 8,
    "frontend_conf": {"n_fft": 1, "hop_length": 1},  # what is spoken are frames already: one sample, one frame
    "use_preprocessor": False,
    "normalize": None,
    "encoder_conf": {
        "main_conf": {"dynamic_chunk_training": True, "short_chunk_size": 4, "num_left_chunks": 1},
        "input_conf": {"subsampling_factor": 4, "conv_size": 8},
        "body_conf": [
            {"block_type": "conformer", "hidden_size": 16, "linear_size": 16, "heads": 2, "conv_mod_kernel_size": 3}
        ],
    },  # fmt: skip
    "decoder": "mega",
    "joint_network_conf": {"joint_space_size": 32},
    "model_conf": {"report_cer": False, "report_wer": False},
    "init": None,
    "batch_type": "unsorted",
    "batch_size": 8,
    "valid_batch_size": 8,
    "num_workers": 0,
    "max_epoch": 1,
    "num_iters_per_epoch": 100,
    "optim": "adam",
    "optim_conf": {"lr": 0.005},
    "use_tensorboard": False,
    "use_matplotlib": False,
    "best_model_criterion": [["valid", "loss", "min"]],
    "keep_nbest_models": 1,
}
DECODER = {"block_size": 16, "linear_size": 16, "qk_size": 8, "v_size": 16, "num_heads": 2, "num_blocks": 2}
OPTIONS = {
    "window": {"attention_window": 2, "max_positions": 2},
    "pre_norm": {"pre_norm": True, "num_heads": 16},
    "both": {"attention_window": 3, "pre_norm": True, "rel_pos_bias_type": "rotary", "truncation_length": 5},
}
SEARCH = {"search_type": "maes", "nstep": 2, "expansion_gamma": 2.3, "expansion_beta": 1}


def spoken(labels) -> np.ndarray:
    """Each label a run of frames of its own, its last third silence. (frames, 8)"""
    frames = 0.1 * np.random.standard_normal((FRAMES * len(labels), 8))  # noqa: NPY002
    for place, label in enumerate(labels):
        frames[FRAMES * place : FRAMES * place + 2 * FRAMES // 3, label] += 1
    return frames.astype(np.float32)


def write_data(folder) -> dict:
    """Eight utterances of seven labels, several times a window; as options for ESPnet."""
    with open(folder / "feats.scp", "w") as feats, open(folder / "text", "w") as text:
        for number in range(8):
            labels = np.random.randint(2, 5, size=7)  # noqa: NPY002
            np.save(folder / f"{number}.npy", spoken(labels))
            feats.write(f"utt{number} {folder / f'{number}.npy'}\n")
            text.write(f"utt{number} {' '.join(map(str, labels))}\n")
    files = [f"{folder / 'feats.scp'},speech,npy", f"{folder / 'text'},text,text_int"]
    return {
        **{f"{part}_data_path_and_name_and_type": [file.split(",") for file in files] for part in ("train", "valid")},
        **{f"{part}_shape_file": [str(folder / "feats.scp")] for part in ("train", "valid")},
    }


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_learns_and_what_is_decoded_is_forwards_best(tmp_path, options):
    np.random.seed(1)  # noqa: NPY002 - one training that is known to arrive
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "decoder_conf": {**DECODER, **options}, **write_data(tmp_path)}))
    losses = []

    class Task(ASRTransducerTask):
        @classmethod
        def build_model(cls, args):
            model = super().build_model(args)
            model.register_forward_hook(lambda _, __, out: losses.append(out[0].item()))
            return model

    Task.main(cmd=["--config", str(config), "--ngpu", "0", "--output_dir", str(tmp_path / "exp"), "--seed", "1"])
    print(losses[0], losses[-1])
    assert np.isfinite(losses).all() and losses[-1] < losses[0] / 4

    files = {"asr_train_config": tmp_path / "exp" / "config.yaml", "asr_model_file": tmp_path / "exp" / "1epoch.pth"}
    recognise = Speech2Text(**files, beam_search_config=SEARCH, beam_size=4)
    decoder = recognise.asr_model.decoder
    assert decoder.attention_window == options.get("attention_window")
    by_forward = BeamSearchTransducer(ForwardOnly(decoder), recognise.beam_search.joint_network, 4, **SEARCH)
    stream = Speech2Text(**files, beam_search_config=SEARCH, beam_size=4, streaming=True, decoding_window=0)

    references = np.loadtxt(tmp_path / "text", dtype=str)[:, 1:].astype(int)
    wrong = 0
    for number, reference in enumerate(references):
        speech = torch.from_numpy(np.load(tmp_path / f"{number}.npy"))
        whole = heard(recognise, lambda speech=speech: recognise(speech))
        parts = heard(stream, lambda speech=speech: streamed(stream, speech))
        for best, frames in (whole, parts):
            with torch.no_grad():
                want = by_forward(frames)[0]
            assert best.yseq == want.yseq and float(best.score) == pytest.approx(float(want.score), abs=1e-3)
        wrong += editdistance.eval(whole[0].yseq[1:], reference.tolist())
        print(reference, whole[0].yseq[1:], parts[0].yseq[1:])
    print(wrong)
    assert wrong <= 5  # of 56 labels that were trained on


def streamed(recognise: Speech2Text, speech: torch.Tensor) -> list:
    first, *others = speech.split(2 * FRAMES)
    recognise.streaming_decode(first)
    for part in others[:-1]:
        recognise.streaming_decode(part)
    return recognise.streaming_decode(others[-1], is_final=True)


def heard(recognise: Speech2Text, decode) -> tuple[Hypothesis, torch.Tensor]:
    """The best hypothesis and all frames that the search was given for it."""
    frames, search = [], recognise.beam_search

    class Listener:
        reset_cache = search.reset_cache

        def __call__(self, enc_out, **options):
            frames.append(enc_out)
            return search(enc_out, **options)

    recognise.beam_search = Listener()
    try:
        return decode()[0], torch.cat(frames)
    finally:
        recognise.beam_search = search
