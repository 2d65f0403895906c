"""`python -m espnet_mega_plugin pictures --asr_exp exp/asr_...`: the pictures of a checkpoint, without training.

Only the decoder is built: neither encoder nor statistics nor recordings have to be there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from torch import Tensor

from espnet_mega_plugin.mega.network import MegaNetwork
from espnet_mega_plugin.pictures.figures import KERNEL_LABELS, Places, draw_attention, draw_kernels
from espnet_mega_plugin.pictures.trainer import folder

CHECKPOINTS = ("valid.loss.ave.pth", "valid.loss.best.pth", "latest.pth")


def draw(
    asr_exp: str | Path,
    checkpoint: str | Path | None = None,
    text: str | Path | None = None,
    num_att_plot: int = 3,
    length: int = KERNEL_LABELS,
    out: str | Path | None = None,
) -> list[Path]:
    """Draws a checkpoint's attention over some utterances, and its EMA kernels.

    Args:
        asr_exp: folder of the training, with its config.yaml.
        checkpoint: weights, in `asr_exp` or a path; default: the first of `CHECKPOINTS` that is there.
        text: Kaldi's table `utterance words ...`; default: the validation text of the training.
        num_att_plot: how many utterances of it; 0 draws the kernels alone.
        length: label distances of the kernels.
        out: where to; default: ESPnet's folder for pictures of attention, `<asr_exp>/att_ws`.

    Returns:
        the pictures' files.

    Raises:
        FileNotFoundError: the configuration, the checkpoint, the text or the token list is not there.
        ValueError: the model has no MEGA decoder, or the checkpoint does not fit it.
    """
    asr_exp = Path(asr_exp)
    config = _config(asr_exp)
    tokens = _tokens(config, asr_exp)
    path = _checkpoint(asr_exp, checkpoint)
    network = _network(config, len(tokens), path)
    places = Places(path.stem, Path(out) if out is not None else folder(asr_exp))
    written = []
    if num_att_plot > 0:
        for utterance, labels in _utterances(config, tokens, asr_exp, text, num_att_plot):
            draw_attention(network, utterance, labels, tokens, places)
            written.append(places.folder / utterance / f"decoder.attention.{places.when}.png")
    draw_kernels(network, places, length)
    return [*written, places.folder / f"decoder.ema_kernels.{places.when}.png"]


def _config(asr_exp: Path) -> dict[str, Any]:
    path = asr_exp / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"--asr_exp {asr_exp}: has no config.yaml; expected the folder of a training.")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if config.get("decoder") not in ("mega", "mega_espnet"):  # both have the same weights
        raise ValueError(f"{path}: decoder: {config.get('decoder')}; only a MEGA decoder (mega) can be drawn.")
    return config


def _tokens(config: dict[str, Any], asr_exp: Path) -> list[str]:
    listed = config["token_list"]
    if isinstance(listed, str):  # ESPnet3 leaves the path; ESPnet writes the list itself
        listed = [line.rstrip("\n") for line in _found(listed, asr_exp, "token_list").open(encoding="utf-8")]
    return list(listed)


def _checkpoint(asr_exp: Path, name: str | Path | None) -> Path:
    if name is None:
        names = CHECKPOINTS
    else:
        names = (name,)
        if Path(name).is_file():
            return Path(name)
    for candidate in names:
        if (asr_exp / candidate).is_file():
            return asr_exp / candidate
    raise FileNotFoundError(f"{asr_exp}: has no {' and no '.join(map(str, names))}; name one with --checkpoint.")


def _network(config: dict[str, Any], vocab_size: int, checkpoint: Path) -> MegaNetwork:
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # such as the checkpoint.pth of ESPnet 202511
        raise ValueError(f"{checkpoint}: holds other things than weights; name a model such as 3epoch.pth.") from error
    for level in ("model", "state_dict"):  # what a training goes on from: ESPnet's and Lightning's
        if isinstance(weights.get(level), dict):
            weights = weights[level]
    embedding = next((name for name in weights if name.endswith("decoder.embed.weight")), None)
    if embedding is None:
        raise ValueError(f"{checkpoint}: holds no weights of a MEGA decoder (decoder.embed.weight); is it a model?")
    prefix = embedding.removesuffix("embed.weight")
    network = MegaNetwork(vocab_size, **(config.get("decoder_conf") or {})).eval()
    network.load_state_dict(
        {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    )
    return network


def _utterances(
    config: dict[str, Any], tokens: list[str], asr_exp: Path, text: str | Path | None, count: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and labels of the first utterances of a text, tokenised as in the training."""
    from espnet2.text.build_tokenizer import build_tokenizer
    from espnet2.text.cleaner import TextCleaner
    from espnet2.text.token_id_converter import TokenIDConverter

    from espnet_mega_plugin.recipe.kaldi_dir import read_table

    if text is None:
        valid = config.get("valid_data_path_and_name_and_type") or []
        text = next((path for path, name, _ in valid if name == "text"), None)
        if text is None:
            raise FileNotFoundError(f"{asr_exp}/config.yaml names no validation text; give one with --text.")
    model = config.get("bpemodel")
    tokenizer = build_tokenizer(
        token_type=config.get("token_type") or "bpe",
        bpemodel=str(_found(model, asr_exp, "bpemodel")) if model else None,
        non_linguistic_symbols=config.get("non_linguistic_symbols"),
        g2p_type=config.get("g2p"),
    )
    clean, number_of = TextCleaner(config.get("cleaner")), TokenIDConverter(tokens)
    table = read_table(_found(text, asr_exp, "text"), empty_values=True)
    for utterance, words in list(table.items())[:count]:
        yield utterance, torch.tensor(number_of.tokens2ids(tokenizer.text2tokens(clean(words))), dtype=torch.long)


def _found(name: str | Path, asr_exp: Path, what: str) -> Path:
    """A file of the configuration, whose relative paths count from the recipe's folder, some folders above."""
    for above in (Path(), *asr_exp.resolve().parents):
        if (above / name).is_file():
            return above / name
    option = " Name another with --text." if what == "text" else ""
    raise FileNotFoundError(f"{what} {name}: not here and not in a folder above {asr_exp}.{option}")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the files that were drawn; 1 where nothing could be drawn, with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mega_plugin pictures",
        description="Draws what a trained MEGA decoder attends to, and its EMA kernels, into ESPnet's folder att_ws.",
    )
    parser.add_argument("--asr_exp", type=Path, required=True, help="folder of the training, with its config.yaml")
    parser.add_argument("--checkpoint", type=Path, help=f"default: the first of {', '.join(CHECKPOINTS)} there is")
    parser.add_argument("--text", type=Path, help="table `utterance words ...`; default: the validation text")
    parser.add_argument("--num_att_plot", type=int, default=3, help="how many of its utterances (default: 3)")
    parser.add_argument(
        "--length", type=int, default=KERNEL_LABELS, help=f"label distances of the kernels (default: {KERNEL_LABELS})"
    )
    parser.add_argument("--out", type=Path, help="folder of the pictures; default: att_ws in --asr_exp")
    options = parser.parse_args(argv)
    if options.num_att_plot < 0 or options.length < 1:
        parser.error("--num_att_plot must be 0 or more and --length 1 or more")
    try:
        for path in draw(**vars(options)):
            print(path)
    except (OSError, ValueError) as error:
        print(f"espnet_mega_plugin pictures: {error}", file=sys.stderr)
        return 1
    return 0
