"""NIST SPHERE recordings: a text header with the sample count, byte order and checksum, then the samples.

    NIST_1A
       1024                       bytes before the samples
    sample_count -i 36800         name, type (i integer, r real, sN text of N bytes), value
    …
    end_head

Plain 16-bit PCM is read, which is what AN4 has; µ-law and compressed files are refused. Everything the header says
about the samples is checked, so a file cut short or damaged is an error and not a shorter recording. (The header's
`sample_min` and `sample_max` are not: half of AN4's are wrong.)

Source: NIST, "SPHERE" 2.6, file format and `sp_verify` (the checksum is the sum of the samples modulo 65536).
"""

import re

import numpy as np

_FIELD = re.compile(r"^(\w+)\s+-(i|r|s\d+)\s+(.+)$")
_BYTE_ORDER = {"01": "<", "10": ">"}  # the place of the low byte: first, last
_NEEDED = ("sample_count", "sample_rate", "sample_n_bytes", "sample_byte_format", "channel_count")


def read_sphere(content: bytes, name: str) -> tuple[np.ndarray, int]:
    """Decode a SPHERE file.

    Args:
        content: the whole file.
        name: what to call it in messages.

    Returns:
        samples: (L,) int16, or (L, channels) for more than one channel.
        sample_rate: samples a second.

    Raises:
        ValueError: not a SPHERE file, a header that is broken or disagrees with the samples, or a coding other than
            16-bit PCM; names the file.
    """
    size, header = _header(content, name)
    missing = [field for field in _NEEDED if field not in header]
    if missing:
        raise ValueError(f"{name}: the SPHERE header lacks {', '.join(missing)}")
    coding, width, order = header.get("sample_coding", "pcm"), header["sample_n_bytes"], header["sample_byte_format"]
    if coding != "pcm" or width != 2 or order not in _BYTE_ORDER:
        raise ValueError(
            f"{name}: expected 16-bit PCM with byte format 01 or 10, got coding {coding!r}, {width} bytes a sample, "
            f"byte format {order!r}; convert the file with sph2pipe or sox"
        )
    count, channels, rate = (header[field] for field in ("sample_count", "channel_count", "sample_rate"))
    if not all(isinstance(number, int) and number > 0 for number in (count, channels, rate)):
        raise ValueError(
            f"{name}: sample_count, channel_count and sample_rate must be positive, got "
            f"{count!r}, {channels!r}, {rate!r}"
        )
    body = content[size:]
    if len(body) != count * channels * width:
        raise ValueError(
            f"{name}: the header promises {count * channels * width} bytes of samples, the file has {len(body)}"
        )
    samples = np.frombuffer(body, dtype=f"{_BYTE_ORDER[order]}i2").astype(np.int16)
    checksum = int(samples.sum(dtype=np.int64)) % 65536
    if header.get("sample_checksum", checksum) != checksum:
        raise ValueError(
            f"{name}: the samples add up to {checksum}, the header's checksum is "
            f"{header['sample_checksum']}; the file is damaged"
        )
    return (samples if channels == 1 else samples.reshape(count, channels)), rate


def _header(content: bytes, name: str) -> tuple[int, dict[str, int | float | str]]:
    start = re.match(rb"NIST_1A\n *(\d+)\n", content)
    if not start:
        raise ValueError(f"{name}: not a NIST SPHERE file, it begins with {content[:8]!r}")
    size = int(start[1])
    text, end, _ = content[start.end() : size].decode("latin-1").partition("end_head")
    if not end:
        raise ValueError(f"{name}: no end_head within the first {size} bytes; the SPHERE header is broken")
    header: dict[str, int | float | str] = {}
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith(";"):
            continue
        field = _FIELD.match(line)
        if not field:
            raise ValueError(f"{name}: cannot read the SPHERE header's line {line!r}")
        key, kind, value = field.groups()
        try:
            header[key] = int(value) if kind == "i" else float(value) if kind == "r" else value
        except ValueError:
            raise ValueError(f"{name}: {key} in the SPHERE header should be a number, got {value!r}") from None
    return size, header
