"""Decoding in batches: `python -m espnet_mega_plugin decode`, and `BatchedSpeech2Text` for programs::

options.py      the command's options, from the command line and a YAML
command.py      what the command does
utterances.py   reads the list and puts batches together
loading.py      the model's files, and what is wrong with them
speech2text.py  BatchedSpeech2Text: model, encoder, search, results as ESPnet's tuples
encoding.py     encoder outputs of a batch, each as alone
streaming.py    any number of utterances whose audio comes in pieces
timing.py       when labels and words were said, and how sure they are
results.py      the files that are written
keys.py         which utterances of a list
progress.py     how far it is
processes.py    several processes, each with a part of the list
"""


def main(argv: list[str] | None = None) -> int:
    from espnet_mega_plugin.decode.command import main

    return main(argv)
