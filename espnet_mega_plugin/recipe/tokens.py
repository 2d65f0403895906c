"""Stage 5 with --token_type bpe: a sentencepiece model of the training text, and ESPnet's token list for it.

The list is ESPnet's: `<blank>` is 0, `<unk>` is 1, then sentencepiece's own pieces, `<sos/eos>` comes last.
"""

import argparse
import io
import sys
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from espnet_mega_plugin.recipe.kaldi_dir import read_table

BLANK, UNKNOWN, SENTENCE_END = "<blank>", "<unk>", "<sos/eos>"
MODES = ("unigram", "bpe", "char", "word")


def train_bpe(
    sentences: Iterable[str],
    size: int,
    mode: str = "unigram",
    symbols: Iterable[str] = (),
    coverage: float = 1.0,
) -> bytes:
    """A sentencepiece model with `size` pieces, as the bytes of its file.

    symbols: non-linguistic symbols, kept whole. coverage: share of characters that get a piece.

    Raises:
        ValueError: unknown mode, no text, or a size the text does not allow (says which one it allows).
    """
    if mode not in MODES:
        raise ValueError(f"bpemode must be one of {', '.join(MODES)}; got {mode!r}")
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise ValueError("the training text is empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=size,
            model_type=mode,
            character_coverage=coverage,
            user_defined_symbols=list(symbols),
            input_sentence_size=100_000_000,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"nbpe {size} with bpemode {mode} does not fit this text; sentencepiece: {reason}") from error
    return model.getvalue()


def token_list(model: bytes) -> list[str]:
    """ESPnet's token list of a sentencepiece model, whose own three control symbols are replaced."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    return [BLANK, UNKNOWN, *pieces[3:], SENTENCE_END]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nbpe", type=int, required=True)
    parser.add_argument("--bpemode", default="unigram", help=f"one of {', '.join(MODES)}")
    parser.add_argument("--bpe_nlsyms", default="", help="symbols separated by commas, or a file with one a line")
    parser.add_argument("--bpe_char_cover", type=float, default=1.0)
    parser.add_argument("--text", type=Path, required=True, help="Kaldi text of the training set")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets bpe.model and tokens.txt")
    args = parser.parse_args()
    symbols = args.bpe_nlsyms
    if symbols and Path(symbols).is_file():
        symbols = ",".join(Path(symbols).read_text(encoding="utf-8").split())
    try:
        model = train_bpe(
            read_table(args.text, empty_values=True).values(),
            args.nbpe,
            args.bpemode,
            [symbol for symbol in symbols.split(",") if symbol],
            args.bpe_char_cover,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"tokens: {error}")
    tokens = token_list(model)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "bpe.model").write_bytes(model)
    (args.output_dir / "tokens.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    print(f"{args.output_dir}/tokens.txt: {len(tokens)} tokens")


if __name__ == "__main__":
    main()
