"""Downloads: resumed where they broke off, refused when the checksum is wrong, never half a file under its name."""

import hashlib
import io
import socket
import tarfile

import numpy as np
import pytest
from served import served

from espnet_mega_plugin.recipe.download import DownloadFailed, download, read_checksums, unpack, verify

CONTENT = np.random.default_rng(3).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.bin").write_bytes(CONTENT)
    with served(tmp_path / "site") as running:
        yield running


def fetched(site, tmp_path, checksum=MD5, **options):
    options = {"attempts": 3, "pause": 0.01, "timeout": 5} | options
    return download([f"{site.url}/a.bin"], tmp_path / "kept" / "a.bin", checksum, **options)


def kept(tmp_path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", None])
def test_a_file_arrives_under_its_name_and_is_not_fetched_twice(site, tmp_path, algorithm):
    checksum = algorithm and hashlib.new(algorithm, CONTENT).hexdigest()
    assert fetched(site, tmp_path, checksum) == tmp_path / "kept" / "a.bin"
    assert kept(tmp_path) == {"a.bin": CONTENT}
    fetched(site, tmp_path, checksum)
    assert site.requests == [("/a.bin", None)]


def test_a_connection_that_breaks_off_is_resumed_at_the_byte(site, tmp_path):
    site.break_after = [100_000, 1]
    fetched(site, tmp_path)
    assert kept(tmp_path) == {"a.bin": CONTENT}
    assert [asked for _, asked in site.requests] == [None, "bytes=100000-", "bytes=100001-"]


def test_a_later_call_goes_on_from_what_an_earlier_one_left(site, tmp_path):
    site.break_after = [70_000, 50_000]
    with pytest.raises(DownloadFailed, match="broke off after 120000 of 300000 bytes") as failed:
        fetched(site, tmp_path, attempts=2)
    assert "0.1 MB of it are kept in" in str(failed.value) and "a.bin.part; the next run goes on" in str(failed.value)
    assert kept(tmp_path) == {"a.bin.part": CONTENT[:120_000]}
    fetched(site, tmp_path)
    assert kept(tmp_path) == {"a.bin": CONTENT} and site.requests[-1] == ("/a.bin", "bytes=120000-")


def test_a_server_without_ranges_is_asked_for_all_of_it_again(site, tmp_path):
    site.break_after, site.ranges = [100_000], False
    fetched(site, tmp_path)
    assert kept(tmp_path) == {"a.bin": CONTENT} and len(site.requests) == 2


@pytest.mark.parametrize("surplus", [0, 1000], ids=["whole", "longer than the file"])
def test_a_remnant_that_leaves_nothing_to_fetch(site, tmp_path, surplus):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a.bin.part").write_bytes(CONTENT + bytes(surplus))
    fetched(site, tmp_path)
    assert kept(tmp_path) == {"a.bin": CONTENT}
    assert [asked for _, asked in site.requests] == [f"bytes={300_000 + surplus}-"] + [None] * bool(surplus)


def test_a_wrong_checksum_is_refused_and_nothing_of_it_stays(site, tmp_path):
    with pytest.raises(DownloadFailed, match=rf"/a.bin: .*a.bin.part: its md5 is {MD5}, expected {'0' * 32}"):
        fetched(site, tmp_path, "0" * 32)
    assert kept(tmp_path) == {}
    assert len(site.requests) == 1  # the same bytes would come again


def test_a_remnant_of_another_file_is_found_out_and_the_next_run_begins_anew(site, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a.bin.part").write_bytes(b"?" * 1000)
    with pytest.raises(DownloadFailed, match="its md5 is"):
        fetched(site, tmp_path)
    fetched(site, tmp_path)
    assert kept(tmp_path) == {"a.bin": CONTENT}


def test_a_file_that_is_there_already_and_wrong_is_not_taken(site, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a.bin").write_bytes(b"something else")
    with pytest.raises(ValueError, match=rf"a.bin: its md5 is .* expected {MD5}.* Delete it"):
        fetched(site, tmp_path)
    assert not site.requests and kept(tmp_path) == {"a.bin": b"something else"}


def test_the_next_address_is_tried_and_every_reason_told(site, tmp_path):
    addresses = [f"{site.url}/gone.bin", f"{site.url}/a.bin"]
    download(addresses, tmp_path / "kept" / "a.bin", MD5, pause=0.01)
    assert [path for path, _ in site.requests] == ["/gone.bin", "/a.bin"]  # not found: not asked again
    with pytest.raises(DownloadFailed) as failed:
        download([f"{site.url}/gone.bin", f"{site.url}/lost.bin"], tmp_path / "kept" / "b.bin", pause=0.01)
    assert str(failed.value).count("HTTP status 404 Not Found") == 2
    assert f"taken from {tmp_path / 'kept' / 'b.bin'}" in str(failed.value)


def test_a_server_in_trouble_is_asked_again(site, tmp_path):
    site.statuses = [503, 500]
    fetched(site, tmp_path)
    assert kept(tmp_path) == {"a.bin": CONTENT} and len(site.requests) == 3


def test_without_a_server_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(DownloadFailed) as failed:
        download([f"http://127.0.0.1:{port}/a.bin"], tmp_path / "kept" / "a.bin", MD5, attempts=2, pause=0.01)
    message = str(failed.value)
    assert message.startswith("a.bin could not be downloaded from\n") and "Connection refused" in message
    assert "Is there a network, and a proxy to name in https_proxy?\n" in message
    assert kept(tmp_path) == {}


def test_a_server_that_falls_silent_counts_as_broken(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.bin"
        with pytest.raises(DownloadFailed, match="timed out"):
            download([url], tmp_path / "kept" / "a.bin", MD5, attempts=1, timeout=0.2)


def test_two_at_once_are_refused(site, tmp_path):
    import fcntl

    (tmp_path / "kept").mkdir()
    with (tmp_path / "kept" / "a.bin.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="a.bin.part: another process is downloading it"):
            fetched(site, tmp_path)
    fetched(site, tmp_path)


def test_a_full_disk_is_told_before_it_is_full(site, tmp_path, monkeypatch):
    import shutil

    from espnet_mega_plugin.recipe import download as module

    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: small)
    with pytest.raises(OSError, match="no room for .*/a.bin: 0 MB to come, 0 MB free"):
        fetched(site, tmp_path)


@pytest.mark.parametrize("checksum", ["", "abc", "X" * 32, "A" * 32])
def test_what_is_no_checksum_is_refused(tmp_path, checksum):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ValueError, match="is no md5, sha1 or sha256"):
        verify(tmp_path / "a", checksum)


def test_lists_of_checksums_are_read_as_md5sum_writes_them(tmp_path):
    (tmp_path / "sums").write_text(f"{MD5}  a.bin\n{MD5} *./folder/b c.bin\n")
    assert read_checksums(tmp_path / "sums") == {"a.bin": MD5, "b c.bin": MD5}
    (tmp_path / "sums").write_text(f"{MD5}  a.bin\nnothing here\n")
    with pytest.raises(ValueError, match="sums, line 2: expected 'checksum  name'"):
        read_checksums(tmp_path / "sums")


def archive(path, *names, kind=tarfile.REGTYPE):
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, 4 * (kind == tarfile.REGTYPE), "/etc"
            tar.addfile(member, io.BytesIO(b"four"))
    return path


def test_an_archive_is_extracted(tmp_path):
    unpack(archive(tmp_path / "a.tar.gz", "x/y/1", "x/2"), tmp_path / "to")
    assert (tmp_path / "to/x/y/1").read_bytes() == (tmp_path / "to/x/2").read_bytes() == b"four"


@pytest.mark.parametrize(
    ("name", "kind"), [("../evil", tarfile.REGTYPE), ("x/../../evil", tarfile.REGTYPE), ("link", tarfile.SYMTYPE)]
)
def test_an_archive_that_points_outside_is_refused(tmp_path, name, kind):
    with pytest.raises(ValueError, match="a.tar.gz: cannot be read"):
        unpack(archive(tmp_path / "a.tar.gz", name, kind=kind), tmp_path / "to")
    assert not (tmp_path / "evil").exists()


def test_a_damaged_archive_is_named(tmp_path):
    content = archive(tmp_path / "a.tar.gz", *map(str, range(50))).read_bytes()
    wrong_sum = content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]
    for broken in (
        content[: len(content) // 2],
        content[:-4],
        content[:60] + b"####" + content[64:],
        wrong_sum,
        b"none",
    ):
        (tmp_path / "b.tar.gz").write_bytes(broken)
        with pytest.raises(ValueError, match="b.tar.gz: cannot be read: .*; delete it"):
            unpack(tmp_path / "b.tar.gz", tmp_path / "to")
