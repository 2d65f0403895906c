"""The MEGA transducer for ESPnet: decoder, loss and recipes.

Importing this package loads neither torch nor ESPnet: torch itself imports it (entry point of `attach.py`),
and a public name is loaded when it is first asked for.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "BatchedSpeech2Text": "espnet_mega_plugin.decode.speech2text",
    "MEGADecoder": "espnet_mega_plugin.decoder",
    "RNNTLoss": "espnet_mega_plugin.rnnt",
    "rnnt_loss": "espnet_mega_plugin.rnnt",
    "register": "espnet_mega_plugin.attach",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
