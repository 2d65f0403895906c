"""ESPnet's prediction networks as label scorers."""


def scorer_of(decoder):
    return decoder.label_scorer()
