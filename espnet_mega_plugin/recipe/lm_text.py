"""Stages 6 and 9: the texts a language model is trained on, as one Kaldi text.

Lines without words are left out. A key that an earlier file has already gets the file's number: `utt-1`, `utt-1-2`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from espnet_mega_plugin.recipe.kaldi_dir import read_table


def joined(texts: Sequence[Path]) -> dict[str, str]:
    """Key -> text of all files, in their order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file's line is blank or a key appears twice in it, or no file has a word.
    """
    lines: dict[str, str] = {}
    for number, path in enumerate(texts, start=1):
        for key, text in read_table(path, empty_values=True).items():
            if text:
                lines[f"{key}-{number}" if key in lines else key] = text
    if not lines:
        raise ValueError(f"no words in {', '.join(map(str, texts))}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("texts", type=Path, nargs="+", help="Kaldi texts")
    args = parser.parse_args()
    try:
        lines = joined(args.texts)
    except (OSError, ValueError) as error:
        sys.exit(f"lm_text: {error}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    new = args.output.with_name(f"{args.output.name}.new")
    new.write_text("".join(f"{key} {text}\n" for key, text in lines.items()), encoding="utf-8")
    new.replace(args.output)
    print(f"{args.output}: {len(lines)} lines")


if __name__ == "__main__":
    main()
