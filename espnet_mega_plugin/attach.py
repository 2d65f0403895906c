"""DOOR 1: everything that touches ESPnet's registries."""


def install() -> None:
    """Called by torch at the end of its import; never raises."""
