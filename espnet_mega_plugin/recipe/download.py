"""Fetch a large file from the web: goes on where it broke off, is checked, and appears whole or not at all.

    name.part    what has arrived; the next attempt, or the next call, asks the server for the rest (HTTP Range)
    name         the file, renamed from name.part once its checksum was found right

Proxies are taken from the environment (http_proxy, https_proxy, no_proxy), as urllib does.
"""

import fcntl
import gzip
import hashlib
import http.client
import os
import re
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from espnet_mega_plugin.recipe.progress import StatusLine, bar, clock

BLOCK = 1 << 20
MEGABYTE = 1_000_000
ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256"}  # by the number of hexadecimal digits
# What goes wrong between here and the server; another OSError is the disk's
BROKEN = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError)


class DownloadFailed(ConnectionError):
    """No address gave the file; the message names each with its reason, and says what to do."""


def download(
    urls: Sequence[str],
    target: str | Path,
    checksum: str | None = None,
    *,
    attempts: int = 4,
    pause: float = 5.0,
    timeout: float = 30.0,
) -> Path:
    """Fetch a file from the first address that gives it; where it is already, only check it.

    Args:
        urls: addresses of the same file, in the order in which to try them.
        target: where to put it; `<target>.part` beside it holds what has arrived so far.
        checksum: md5, sha1 or sha256 in hexadecimal digits; None: its length is all that is checked.
        attempts: how often to try each address; a connection that broke off is resumed.
        pause: seconds between attempts.
        timeout: seconds without an answer after which a connection counts as broken.

    Returns:
        target.

    Raises:
        DownloadFailed: no address gave it.
        ValueError: `target` is there with another checksum, or `checksum` is none.
        BlockingIOError: another process is downloading it.
        OSError: the disk has no room for it.
    """
    target = Path(target)
    if target.is_file():
        try:
            verify(target, checksum)
        except ValueError as error:
            raise ValueError(f"{error}. Delete it to have it downloaded") from None
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    reasons = []
    with part.open("ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{part}: another process is downloading it; wait for that one to end") from None
        for url in urls:
            if reason := _from_one(url, out, checksum, attempts, pause, timeout):
                reasons.append(f"  {url}: {reason}")
                continue
            os.replace(part, target)
            return target
        size = out.seek(0, os.SEEK_END)
    kept = f" {size / MEGABYTE:.1f} MB of it are kept in {part}; the next run goes on from there." if size else ""
    if not size:
        part.unlink()
    raise DownloadFailed(
        "\n".join([f"{target.name} could not be downloaded from", *reasons])
        + f"\nIs there a network, and a proxy to name in https_proxy?{kept}\n"
        f"A file that was fetched elsewhere is taken from {target}."
    )


def _from_one(url: str, out, checksum: str | None, attempts: int, pause: float, timeout: float) -> str | None:
    """Fill `out` from one address; returns why that failed, None when the file is whole and right."""
    reason = None
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause)
        try:
            _fetch(url, out, timeout)
        except urllib.error.HTTPError as error:
            reason = f"HTTP status {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):  # it understood: asking again is of no use
                return reason
        except BROKEN as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        else:
            try:
                verify(Path(out.name), checksum)
            except ValueError as error:
                out.truncate(0)  # nobody could tell which of it is right
                return str(error)
            return None
    return reason


def _fetch(url: str, out, timeout: float) -> None:
    """Append what `out` lacks; all of it, from the beginning, where the server does not know ranges."""
    have = out.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if error.code != 416 or not have:
            raise
        if whole and int(whole[1]) == have:
            return  # nothing lies beyond what is here
        out.truncate(0)
        raise ConnectionError("the server's file is shorter than what is here; begun anew") from error
    with response:
        if have and not _continues(response, have):
            out.truncate(0)
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        if total and total - have > (free := shutil.disk_usage(Path(out.name).parent).free):
            raise OSError(
                f"{Path(out.name).parent}: no room for {url}: {(total - have) / MEGABYTE:.0f} MB to come, "
                f"{free / MEGABYTE:.0f} MB free"
            )
        got = _copy(response, out, have, total)
    if total is not None and got < total:
        raise ConnectionError(f"the connection broke off after {got} of {total} bytes")


def _continues(response, have: int) -> bool:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return response.status == 206 and bool(found) and int(found[1]) == have


def _copy(response, out, have: int, total: int | None) -> int:
    """Write what comes and show how far it is; returns the size of `out`."""
    status, name, began, at_first = StatusLine(), Path(out.name).stem, time.monotonic(), have
    try:
        while block := response.read(BLOCK):
            out.write(block)
            have += len(block)
            rate = (have - at_first) / max(time.monotonic() - began, 1e-3)
            status.show(f"{name} {_progress(have, total, rate)}")
    finally:
        out.flush()
        status.keep(f"{name}: {have / MEGABYTE:.1f} MB after {clock(time.monotonic() - began)}")
    return have


def _progress(have: int, total: int | None, rate: float) -> str:
    if total is None:
        return f"{have // MEGABYTE} MB"
    shown = bar(have // MEGABYTE, total // MEGABYTE)
    return f"{shown} MB, {rate / MEGABYTE:.1f} MB/s, ETA {clock((total - have) / max(rate, 1))}"


def verify(path: Path, checksum: str | None) -> None:
    """Compare a file with its md5, sha1 or sha256; None says nothing.

    Raises:
        ValueError: they differ, or `checksum` has the length of none of these.
    """
    if checksum is None:
        return
    if len(checksum) not in ALGORITHMS or not re.fullmatch(r"[0-9a-f]+", checksum):
        raise ValueError(f"{checksum!r} is no md5, sha1 or sha256 in small hexadecimal digits")
    digest = hashlib.new(ALGORITHMS[len(checksum)], usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != checksum:
        raise ValueError(f"{path}: its {digest.name} is {digest.hexdigest()}, expected {checksum}, so it is damaged")


def read_checksums(path: Path) -> dict[str, str]:
    """File name -> checksum, of a list as md5sum and sha256sum write it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has another form; names file and line.
    """
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]+) [ *](\S.*)", line)
        if not match or len(match[1]) not in ALGORITHMS:
            raise ValueError(f"{path}, line {number}: expected 'checksum  name' as md5sum writes it, got {line!r}")
        found[Path(match[2]).name] = match[1]
    return found


def unpack(archive: Path, folder: Path) -> None:
    """Extract a .tar.gz; nothing lands outside of `folder`.

    Raises:
        ValueError: the archive is damaged, cut short, or has an entry that points outside.
    """
    status, done = StatusLine(), 0
    with read_through(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.extract(member, folder, filter="data")
            done += 1
            status.show(f"{archive.name}: {done} files")
    status.keep(f"{archive.name}: {done} files extracted")


@contextmanager
def read_through(archive: Path) -> Iterator[gzip.GzipFile]:
    """The uncompressed content of a .gz, read to its end at the latest when the block ends.

    That is where gzip has its checksum; tarfile stops reading before it, and takes some cuts for the archive's end.

    Raises:
        ValueError: it is damaged or cut short, or what is read inside the block proves to be no sound tar.
    """
    try:
        with gzip.open(archive) as file:
            yield file
            while file.read(BLOCK):
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{archive}: cannot be read: {error}; delete it to have it downloaded anew") from error
