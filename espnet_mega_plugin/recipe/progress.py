"""What a long stage shows while it runs: on a terminal one line that is rewritten, elsewhere a line now and then."""

import os
import sys
import time

SECONDS_BETWEEN_LINES = 30  # where the line cannot be rewritten, in a file or a CI log


class StatusLine:
    """`show` may be called often; `keep` prints a line that stays."""

    def __init__(self):
        self._terminal = sys.stdout.isatty()
        self._shown_at = time.monotonic()
        self._width = 0

    def show(self, text: str) -> None:
        if self._terminal:
            print("\r" + text.ljust(self._width), end="", flush=True)
            self._width = len(text)
        elif time.monotonic() - self._shown_at > SECONDS_BETWEEN_LINES:
            print(text, flush=True)
            self._shown_at = time.monotonic()

    def keep(self, text: str) -> None:
        print(("\r" + text.ljust(self._width)) if self._terminal else text, flush=True)
        self._width = 0
        self._shown_at = time.monotonic()


class LogFollower:
    """The lines a log file gained since the last look; all of them where another file has taken its place."""

    def __init__(self, path):
        self._path = path
        self._position = path.stat().st_size if path.exists() else 0
        self._file = path.stat().st_ino if path.exists() else None
        self._partial = ""

    def new_lines(self) -> list[str]:
        if not self._path.exists():
            return []
        with self._path.open("r", encoding="utf-8", errors="replace") as log:
            if (file := os.fstat(log.fileno()).st_ino) != self._file:
                self._file, self._position, self._partial = file, 0, ""
            log.seek(self._position)
            text = self._partial + log.read()
            self._position = log.tell()
        *lines, self._partial = text.split("\n")
        return lines


def clock(seconds: float) -> str:
    """`75` -> `1:15`, `4000` -> `1:06:40`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def bar(done: int, total: int, width: int = 30) -> str:
    filled = width * done // max(total, 1)
    return f"[{'#' * filled}{'.' * (width - filled)}] {done}/{total}"
