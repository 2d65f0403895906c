"""How far a decoding is: a bar on stderr, or lines `done UTTERANCES SECONDS_OF_AUDIO` on stdout for another program."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30  # of a bar that cannot be redrawn, in a file


class Progress:
    """A context manager. `rtf` is the time that has passed since its begin over the length of the audio done."""

    def __init__(self, kind: str, total: int):
        interval = 0.2 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
        self._total = total
        self._kind, self._audio, self._began = kind, 0.0, time.monotonic()
        self._bar = tqdm(
            total=total, desc="decoding", unit="utt", disable=kind != "bar", mininterval=interval, file=sys.stderr
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def rtf(self) -> float | None:
        return self.seconds / self._audio if self._audio else None

    def done(self, utterances: int, audio: float) -> None:
        """
        Args:
            audio: seconds; 0 where it is not known.
        """
        self._audio += audio
        if self._kind == "lines":
            print("done", utterances, f"{audio:.3f}", flush=True)
        if self.rtf is not None:
            self._bar.set_postfix_str(f"RTF {self.rtf:.4f}", refresh=False)
        self._bar.update(utterances)

    def summary(self, skipped: int) -> str:
        audio = f"{self._audio:.1f} s of audio in " if self._audio else ""
        rtf = f", RTF {self.rtf:.4f}" if self.rtf is not None else ""
        lost = f"; {skipped} skipped" if skipped else ""
        return f"{self._total} utterances, {audio}{self.seconds:.1f} s{rtf}{lost}"
