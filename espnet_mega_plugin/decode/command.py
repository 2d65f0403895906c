"""`python -m espnet_mega_plugin decode`: a list of utterances, in batches, into files.

Utterances are read a pool of batches at a time, batches made of those of similar length, and results written in the
order of the list when a pool is done. What cannot be read or decoded is named and skipped; it never ends the run. The
results do not depend on how utterances are put together, but for rounding.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from espnet_mega_plugin.decode.options import parsed
from espnet_mega_plugin.decode.results import emptied, written

NO_RESULT = 3  # exit status; Python's own is 1 for any exception, and argparse's 2 for wrong options
INTERRUPTED = 130  # as a shell says it of a command that Ctrl-C has ended

_log = logging.getLogger("espnet_mega_plugin")
_hypotheses = logging.getLogger("espnet_mega_plugin.hypotheses")  # what --display_hypotheses asks for


def main(argv: list[str] | None = None) -> int:
    """Decodes.

    Returns:
        0, or 3 when no utterance has a result, 130 when Ctrl-C has interrupted it. Wrong options or files, and
        processes that failed, end this one with status 2 and a message.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parsed(argv)
    logging.basicConfig(
        level=options.log_level, format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s"
    )
    # its own option asked for them: they are shown at any log level
    _hypotheses.setLevel(logging.INFO if options.display_hypotheses else logging.NOTSET)
    if options.num_processes is None:
        options.num_processes = max(1, options.ngpu)
    try:
        return _run(options, argv)
    except KeyboardInterrupt as interrupted:
        held = _held(options.output_dir, str(interrupted))
        print(f"espnet_mega_plugin decode: interrupted, {held}; decode again.", file=sys.stderr)
        return INTERRUPTED


def _held(folder: str, of_all: str) -> str:
    """What an interrupted decoding has written. of_all: how many utterances of the list that could be, if known."""
    done = written(folder)
    return f"{folder} holds {done}{of_all} utterances and is not complete" if done else "there is no result"


def _run(options: argparse.Namespace, argv: list[str]) -> int:
    try:
        emptied(options.output_dir)
        if options.num_processes > 1:
            from espnet_mega_plugin.decode.processes import decode_in_processes

            return decode_in_processes(options, argv)
        speech2text, read, keys = _open(options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        _refuse(error)
    try:
        return decode(options, speech2text, read, keys)
    except OSError as error:  # the results cannot be written; anything else is a mistake of the program, and shown
        _refuse(error)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f" of {len(keys)}") from error


def _refuse(error: Exception) -> NoReturn:
    _log.debug("decode failed", exc_info=True)
    print(f"espnet_mega_plugin decode: {error}", file=sys.stderr)
    raise SystemExit(2) from error


def _open(options: argparse.Namespace) -> tuple:
    """The model, the reader of the list, and the keys to decode."""
    from espnet_mega_plugin.decode.keys import keys_to_decode
    from espnet_mega_plugin.decode.utterances import Reader

    speech2text = _speech2text(options)
    data, others = options.data_path_and_name_and_type, options.allow_variable_data_keys
    read = Reader(data, speech2text.asr_train_args, others, speech2text.sampling_rate)
    return speech2text, read, keys_to_decode(options.key_file, read.keys)


def decode(options: argparse.Namespace, speech2text, read, keys: Sequence[str]) -> int:
    """Decodes in this process."""
    from espnet_mega_plugin.decode.progress import Progress
    from espnet_mega_plugin.decode.results import ResultFiles
    from espnet_mega_plugin.decode.utterances import POOL, batches, pools

    most = options.max_batch_frames * speech2text.samples_per_frame
    rate, skipped = speech2text.sampling_rate, 0
    with ResultFiles(options.output_dir) as files, Progress(options.progress, len(keys)) as progress:
        for pool in pools(read, keys, POOL * options.batch_size, options.num_workers):
            found = {utterance.key: utterance.trouble for utterance in pool if utterance.speech is None}
            progress.done(len(found), 0.0)
            readable = [utterance for utterance in pool if utterance.speech is not None]
            for batch in batches(readable, options.batch_size, most):
                found |= decoded(speech2text, batch, options.display_hypotheses)
                progress.done(len(batch), sum(len(u.speech) for u in batch) / rate if rate else 0.0)
            for utterance in pool:
                skipped += _write(files, speech2text, utterance.key, found[utterance.key], options.display_hypotheses)
            files.flush()
        summary = progress.summary(skipped)
    if options.progress == "bar":
        print(summary, file=sys.stderr)
    _log.info(summary)
    return NO_RESULT if skipped == len(keys) else 0


def decoded(speech2text, batch: Sequence, display: bool = False) -> dict[str, list | str]:
    """The n-best list of each utterance, or why there is none.

    A batch that fails is decoded by halves, down to the utterance at fault: one that needs too much memory does not
    take the others along.
    """

    def log_partial(place: int, milliseconds: float, results: list) -> None:
        if results:
            key, text = batch[place].key, results[0][0]
            _hypotheses.info("Current best hypothesis (0-%.0fms): %s: %s", milliseconds, key, text)

    try:
        found = speech2text([utterance.speech for utterance in batch], log_partial if display else None)
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:
        if len(batch) == 1:
            _log.debug("%s failed", batch[0].key, exc_info=True)
            return {batch[0].key: f"cannot be decoded: {type(error).__name__}: {error}"}
        half = len(batch) // 2
        return decoded(speech2text, batch[:half], display) | decoded(speech2text, batch[half:], display)
    nothing = "cannot be decoded: the model's scores are not numbers"
    return {utterance.key: nbest or nothing for utterance, nbest in zip(batch, found, strict=True)}


def _write(files, speech2text, key: str, found: list | str, display: bool) -> int:
    """Writes an n-best list; 1 where there is none."""
    if isinstance(found, str):
        _log.warning("Utterance %s is skipped: it %s", key, found)
        files.skip(key, found)
        return 1
    if display:
        _hypotheses.info("Final best hypothesis: %s: %s", key, found[0][0])
    timed = speech2text.seconds_per_frame is not None
    for place, result in enumerate(found, 1):
        times, words = (speech2text.times(result), speech2text.words(result)) if timed else (None, None)
        files.write(key, place, result, times, words)
    return 0


def _speech2text(options: argparse.Namespace):
    import torch

    from espnet_mega_plugin.decode.speech2text import BatchedSpeech2Text

    torch.manual_seed(options.seed)
    if options.ngpu and not torch.cuda.is_available():
        raise ValueError(f"ngpu is {options.ngpu}, but torch sees no GPU here. Leave --ngpu out to decode on the CPU.")
    same = (
        *("asr_train_config", "asr_model_file", "beam_search_config", "lm_train_config", "lm_file", "token_type"),
        *("bpemodel", "beam_size", "dtype", "lm_weight", "quantize_asr_model", "quantize_modules", "quantize_dtype"),
        *("nbest", "streaming", "decoding_window", "left_context", "ngram_file", "ngram_weight", "phrases"),
        *("phrase_weight", "encoder_batches"),
    )
    arguments = {name: getattr(options, name) for name in same}
    try:
        return BatchedSpeech2Text(**arguments, device="cuda" if options.ngpu else "cpu")
    except TypeError as error:  # an option's; elsewhere it would be a mistake of the program
        raise ValueError(error) from error
