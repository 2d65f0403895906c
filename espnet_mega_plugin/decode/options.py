"""The options of `python -m espnet_mega_plugin decode`: those of ESPnet's asr_transducer_inference, and more.

What is written means what it says: `--streaming false` is false, and a mapping may be given on the command line.
`--config FILE` is ESPnet's: a YAML with the same names; the command line goes before it. Needs neither torch nor
ESPnet, so that `--help` and wrong options are quick.
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

import yaml

DTYPES = ("float32", "bfloat16", "float16", "float64")
ENCODER_BATCHES = ("auto", "alone", "padded")
LOG_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG", "NOTSET")
PROGRESS = ("bar", "lines", "none")
DESCRIPTION = """\
Decode utterances in batches with a transducer that ESPnet trained: the same words as each of them alone.

example: python -m espnet_mega_plugin decode --asr_model_file exp/asr/valid.loss.ave.pth \\
             --data_path_and_name_and_type dump/raw/test/wav.scp,speech,sound --output_dir exp/asr/decoded

exit status: 0; 2: an option or a file is wrong, or a process failed; 3: no utterance has a result; 130: Ctrl-C
"""


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    """The options. Ends the process with status 2 and a message where they cannot be."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    parser = _parser()
    config = first.parse_known_args(argv)[0].config
    if config is not None:
        parser.set_defaults(**_from_yaml(config, parser))
    options = parser.parse_args(argv)
    for name in ("output_dir", "asr_model_file", "data_path_and_name_and_type"):
        if not getattr(options, name) and not options.model_tag:
            parser.error(f"--{name} is missing")
    if options.model_tag:
        parser.error(
            f"--model_tag {options.model_tag}: nothing is downloaded here. Get the model with espnet_model_zoo "
            "(`espnet_model_zoo_download --unpack true TAG`) and name its files: --asr_train_config, --asr_model_file"
        )
    for name in ("batch_size", "max_batch_frames", "beam_size", "nbest", "num_processes", "decoding_window"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: expected 1 or more")
    for name in ("ngpu", "num_workers"):
        if getattr(options, name) < 0:
            parser.error(f"--{name} {getattr(options, name)}: expected 0 or more")
    return options


def boolean(text: str) -> bool:
    if text.strip().lower() in ("true", "yes", "on", "1"):
        return True
    if text.strip().lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def text_or_none(text: str) -> str | None:
    return None if text.strip().lower() in ("none", "null", "nil", "") else text


def triple(text: str) -> tuple[str, str, str]:
    """`wav.scp,speech,sound` as ESPnet has it."""
    parts = tuple(part.strip() for part in text.strip("()[] ").split(","))
    if len(parts) != 3 or not all(parts):
        raise argparse.ArgumentTypeError(f"expected FILE,NAME,TYPE such as wav.scp,speech,sound; got {text!r}")
    return parts


def names(text: str) -> list[str]:
    """`Linear,LSTM`, in brackets or not."""
    return [name for name in (part.strip() for part in text.strip("[]() ").split(",")) if name]


class Mapping(argparse.Action):
    """`{a: 1, b: x}`, a mapping in YAML, takes the place of what was there; `a=1 b=x` changes single entries."""

    def __call__(self, parser, namespace, values, option_string=None):
        found = dict(getattr(namespace, self.dest) or {})
        whole = _yaml_or_none(" ".join(values))
        if isinstance(whole, dict):
            found = whole
        else:
            for entry in values:
                name, equals, value = entry.partition("=")
                if not equals or not name:
                    parser.error(f"{option_string}: expected {{name: value}} or name=value, got {entry!r}")
                found[name.strip()] = _yaml_or_none(value)
        setattr(namespace, self.dest, found)


class Names(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [name for value in values for name in names(value)])


class Entries(argparse.Action):
    """May be given several times. The first takes the place of what the YAML has; the others are added."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if before is self.default else before), values])


def _yaml_or_none(text: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _from_yaml(file: str, parser: argparse.ArgumentParser) -> dict:
    """A YAML's entries as defaults, each as the command line would read it."""
    try:
        given = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except OSError as error:
        parser.error(f"--config {file}: {error.strerror}")
    except UnicodeDecodeError as error:
        parser.error(f"--config {file}: expected text in UTF-8: {error}")
    except yaml.YAMLError as error:
        parser.error(f"--config {file}: no YAML: {error}")
    if not isinstance(given, dict):
        parser.error(f"--config {file}: expected `name: value` lines, got {given!r:.60}")
    actions = {action.dest: action for action in parser._actions}
    found = {}
    for name, value in given.items():
        if name not in actions or name in ("help", "config"):
            near = difflib.get_close_matches(str(name), actions, n=1)
            parser.error(f"--config {file}: unknown key {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        found[name] = _checked(parser, f"--config {file}: {name}", actions[name], value)
    return found


def _checked(parser: argparse.ArgumentParser, where: str, action: argparse.Action, value):
    if value is None:
        return action.default
    if isinstance(action, Entries):
        entries = value if isinstance(value, list) else [value]
        try:
            return [triple(",".join(map(str, entry)) if isinstance(entry, list) else str(entry)) for entry in entries]
        except argparse.ArgumentTypeError as error:
            parser.error(f"{where}: {error}")
    if isinstance(action, Names):
        return names(value) if isinstance(value, str) else [str(name) for name in value]
    if isinstance(action, Mapping):
        if isinstance(value, dict):
            return value
        parser.error(f"{where}: expected a mapping, got {value!r}")
    if isinstance(value, (dict, list)):
        parser.error(f"{where}: expected one value, got {value!r}")
    try:
        value = (action.type or str)(str(value))
    except (argparse.ArgumentTypeError, ValueError):
        parser.error(f"{where}: {value!r} is no value for it ({action.help})")
    if action.choices is not None and value not in action.choices:
        parser.error(f"{where}: expected one of {', '.join(map(str, action.choices))}; got {value!r}")
    return value


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mega_plugin decode", description=DESCRIPTION, formatter_class=_Help, allow_abbrev=False
    )

    def flag(group, name: str, default: bool, text: str) -> None:
        group.add_argument(name, type=boolean, nargs="?", const=True, default=default, metavar="true|false", help=text)

    parser.add_argument("--config", help="YAML with options, as ESPnet's decoding YAMLs")
    parser.add_argument("--log_level", type=str.upper, default="WARNING", choices=LOG_LEVELS, help="what is logged")
    parser.add_argument("--output_dir", help="folder for the results (required)")
    parser.add_argument("--progress", default="bar", choices=PROGRESS, help="on stderr; lines: for programs, on stdout")
    flag(parser, "--display_hypotheses", False, "log best hypotheses, and partial ones when streaming")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path_and_name_and_type",
        type=triple,
        action=Entries,
        metavar="FILE,speech,TYPE",
        help="such as wav.scp,speech,sound (required)",
    )
    group.add_argument("--key_file", type=text_or_none, help="decode only the utterances of its first column")
    flag(group, "--allow_variable_data_keys", False, "allow data of other names, which are not read")
    group.add_argument("--num_workers", type=int, default=1, help="threads that read")

    group = parser.add_argument_group("model")
    group.add_argument("--asr_train_config", type=text_or_none, help="config.yaml of the training (beside the model)")
    group.add_argument("--asr_model_file", type=text_or_none, help="checkpoint (required)")
    group.add_argument("--model_tag", type=text_or_none, help="refused: nothing is downloaded here")
    group.add_argument("--token_type", type=text_or_none, help="None: that of the training")
    group.add_argument("--bpemodel", type=text_or_none, help="None: that of the training")

    group = parser.add_argument_group("batches and devices")
    group.add_argument("--batch_size", type=int, default=16, help="utterances at once")
    group.add_argument("--max_batch_frames", type=int, default=40000, help="encoder frames of a padded batch, at most")
    group.add_argument("--encoder_batches", default="auto", choices=ENCODER_BATCHES, help="encode one by one or padded")
    group.add_argument("--ngpu", type=int, default=0, help="GPUs, a process each; 0: the CPU")
    group.add_argument("--num_processes", type=int, help="processes the list is split over (one, or one a GPU)")
    group.add_argument("--dtype", default="float32", choices=DTYPES, help="of encoder, decoder and joint network")
    group.add_argument("--seed", type=int, default=0, help="seed of torch; decoding draws nothing")

    group = parser.add_argument_group("search")
    group.add_argument("--beam_size", type=int, default=5, help="hypotheses that are kept")
    group.add_argument("--nbest", type=int, default=1, help="hypotheses an utterance, at most")
    group.add_argument(
        "--beam_search_config",
        nargs="+",
        action=Mapping,
        default={},
        help="search_type (maes, greedy, tsd, alsd), nstep, expansion_gamma ...: {search_type: maes} or nstep=3",
    )

    group = parser.add_argument_group("language models and phrases")
    group.add_argument("--lm_train_config", type=text_or_none, help="config.yaml of a language model (beside lm_file)")
    group.add_argument(
        "--lm_file",
        type=text_or_none,
        help="language model trained with ESPnet, LSTM or Transformer; changes no word of greedy",
    )
    group.add_argument("--lm_weight", type=float, default=1.0, help="weight of the language model")
    group.add_argument(
        "--ngram_file", type=text_or_none, help="n-gram model over the tokens, ARPA, plain or gzip; no more of greedy"
    )
    group.add_argument("--ngram_weight", type=float, default=0.5, help="weight of the n-gram model")
    group.add_argument(
        "--phrases",
        type=text_or_none,
        help="phrases to prefer, one a line, a tab and its weight behind; greedy prefers none, and maes takes no label "
        "beyond its beam_size + expansion_beta most probable tokens or expansion_gamma behind the best",
    )
    group.add_argument("--phrase_weight", type=float, default=1.0, help="of phrases without one, nats a label")

    group = parser.add_argument_group("dynamic quantisation, on a CPU")
    flag(group, "--quantize_asr_model", False, "quantise the model")
    group.add_argument("--quantize_modules", nargs="+", action=Names, help="of Linear, LSTM (Linear)")
    group.add_argument("--quantize_dtype", default="qint8", choices=("qint8", "float16"), help="type of the weights")

    group = parser.add_argument_group("streaming")
    flag(group, "--streaming", False, "encode chunk by chunk, as the audio would come in")
    group.add_argument("--decoding_window", type=int, default=640, help="length of a chunk, milliseconds")
    group.add_argument("--left_context", type=int, default=32, help="encoder frames before a chunk that attention sees")
    return parser
