"""mini_an4 with a MEGA transducer in ESPnet-EZ, from data to a word error rate. Half a minute on two cores:

    python run.py

ESPnet-EZ is in ESPnet 202511 (Python 3.10, 3.11); ESPnet 202611 has ESPnet3 in its place, see ../espnet3. Nothing here
names the plugin's decoder: `decoder: mega` in the configuration is the plugin's, because it is attached to ESPnet.
"""

import argparse
import sys
from pathlib import Path

import espnetez as ez
import soundfile
from espnet2.bin.asr_transducer_inference import Speech2Text

from espnet_mega_plugin import MEGADecoder, register
from espnet_mega_plugin.recipe import mini_an4
from espnet_mega_plugin.recipe.kaldi_dir import read_data_dir, write_table
from espnet_mega_plugin.recipe.score import Counts, score, words
from espnet_mega_plugin.recipe.tokens import token_list, train_bpe

HERE = Path(__file__).resolve().parent
DATA_INFO = {"speech": ["wav.scp", "sound"], "text": ["text", "text"]}

register()  # already done where torch attaches the plugin; here it also says what is missing


def prepare(data: Path) -> None:
    """The sets, unless they are there (stage 1 of ../asr1); AN4 is fetched where no ESPnet carries it."""
    if not all((data / name / "spk2utt").is_file() for name in mini_an4.SETS):
        try:
            source = mini_an4.find_source()
        except FileNotFoundError:
            source = mini_an4.fetch()
        mini_an4.make(data, source=source)


def configuration(path: Path, data: Path, exp: Path, size: int, epochs: int | None) -> dict:
    """ESPnet's defaults, the YAML on top of them, and the tokens of the training text."""
    exp.mkdir(parents=True, exist_ok=True)
    model = train_bpe(read_data_dir(data / "train_nodev").text.values(), size, "bpe")
    (exp / "bpe.model").write_bytes(model)
    arguments, sys.argv = sys.argv, sys.argv[:1]  # from_yaml reads the command line as ESPnet's own
    try:
        config = ez.from_yaml("asr_transducer", path)
    finally:
        sys.argv = arguments
    config.update(token_type="bpe", bpemodel=str(exp / "bpe.model"), token_list=token_list(model), resume=True)
    if epochs is not None:
        config["max_epoch"] = epochs
    return config


def train(config: dict, data: Path, exp: Path) -> None:
    """Statistics and training; a training that was interrupted goes on."""
    trainer = ez.Trainer(
        task="asr_transducer",
        train_config=config,
        train_dump_dir=data / "train_nodev",
        valid_dump_dir=data / "train_dev",
        data_info=DATA_INFO,
        output_dir=str(exp / "asr"),
        stats_dir=str(exp / "stats"),
        ngpu=0,
    )
    trainer.collect_stats()
    trainer.train()


def decode(exp: Path, data: Path, name: str) -> Counts:
    """Decodes a set into `<exp>/asr/decode/<set>/text` and counts its words."""
    speech2text = Speech2Text(
        asr_train_config=str(exp / "asr" / "config.yaml"),
        asr_model_file=str(exp / "asr" / "valid.loss.ave.pth"),
        beam_size=3,
        beam_search_config={"search_type": "maes", "nstep": 2},
    )
    decoder = speech2text.asr_model.decoder
    if not isinstance(decoder, MEGADecoder):
        raise RuntimeError(f"{type(decoder)} decodes; expected {MEGADecoder}.")
    given, texts = read_data_dir(data / name), {}
    for utterance in given.utterances():
        speech, _ = soundfile.read(given.wav[utterance], dtype="float32")
        best, *_ = speech2text.hypotheses_to_results(speech2text(speech))
        texts[utterance] = best[0]
    write_table(exp / "asr" / "decode" / name / "text", texts)
    return sum((one.counts for one in score(given.text, texts, words).values()), Counts())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder of train_nodev, train_dev and test")
    parser.add_argument("--exp", type=Path, default=HERE / "exp", help="folder of what is trained and decoded")
    parser.add_argument("--config", type=Path, default=HERE / "../asr1/conf/mini_an4_tiny.yaml", help="training YAML")
    parser.add_argument("--nbpe", type=int, default=30, help="number of tokens")
    parser.add_argument("--epochs", type=int, help="default: the YAML's max_epoch")
    options = parser.parse_args()
    data, exp = options.data.resolve(), options.exp.resolve()
    prepare(data)
    train(configuration(options.config, data, exp, options.nbpe, options.epochs), data, exp)
    for name in ("train_dev", "test"):
        counts = decode(exp, data, name)
        print(f"{name}: {counts.sentences} utterances, {counts.units} words, WER {counts.percentages()[4]:.1f} %")


if __name__ == "__main__":
    main()
