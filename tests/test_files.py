"""How files are written: whole or not at all, with the modes, owners and links that a shell would leave."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from actzip.codec import MapWriter, load_maps, save_maps
from actzip.errors import DataError
from actzip.files import write_bytes, write_text, write_with

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes and links are those of POSIX")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def both(path: Path) -> None:
    """The two ways in which files are written."""
    write_bytes(path, b"new")
    save_maps(path, {"a": np.zeros(3, np.uint8)})


@pytest.mark.parametrize("mask,want", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_write_modes_of_a_new_file_are_those_of_the_umask(tmp_path: Path, mask: int, want: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a", "x")
        save_maps(tmp_path / "b", {"a": np.zeros(3, np.uint8)})
    finally:
        os.umask(before)
    assert mode(tmp_path / "a") == mode(tmp_path / "b") == want


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o755])
def test_write_modes_of_a_replaced_file_stay(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(kept)
    both(path)
    assert mode(path) == kept and list(load_maps(path)) == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_of_a_replaced_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    os.chown(path, 1234, 4321)
    both(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)


def test_links_go_on_pointing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    real, link, far = tmp_path / "folder" / "real", tmp_path / "link", tmp_path / "far"
    real.write_bytes(b"old")
    link.symlink_to("folder/real")
    far.symlink_to("folder/not yet")
    both(link)
    both(far)
    assert link.is_symlink() and far.is_symlink() and list(load_maps(real)) == ["a"]
    assert (tmp_path / "folder" / "not yet").is_file()
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(DataError, match="loop"):
        write_bytes(loop, b"x")


def test_pipes_and_devices_are_written_to(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for write in (
        lambda: write_bytes(fifo, b"abc"),
        lambda: write_with(fifo, lambda f: np.save(f, np.arange(3))),
    ):
        got: list[bytes] = []
        reader = threading.Thread(target=lambda got=got: got.append(fifo.read_bytes()))
        reader.start()
        write()
        reader.join(10)
        assert stat.S_ISFIFO(fifo.stat().st_mode) and (got[0] == b"abc" or got[0][:6] == b"\x93NUMPY")
    before = os.stat("/dev/null").st_rdev
    both(Path("/dev/null"))
    assert os.stat("/dev/null").st_rdev == before and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(DataError, match="No space"):
        write_bytes("/dev/full", b"x")
    with pytest.raises(DataError, match="directory"):
        write_bytes(tmp_path, b"x")


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "a", tmp_path / ("n" * 300), tmp_path / "a\0b"):
        with pytest.raises(DataError, match="cannot write"):
            write_bytes(path, b"x")
        with pytest.raises(DataError, match="cannot write"):
            MapWriter(path)
    assert not list(tmp_path.iterdir())
    long = tmp_path / ("é" * 120)
    both(long)
    assert long.exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_files_and_folders_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o444)
    with pytest.raises(DataError, match="cannot write"):
        write_bytes(path, b"new")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(DataError, match="cannot write"):
            write_bytes(tmp_path / "b", b"new")
    finally:
        tmp_path.chmod(0o755)
    assert path.read_bytes() == b"old"


def test_an_error_or_a_hard_kill_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_with(path, fail)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    code = (
        "import os, signal, sys; from actzip.files import write_with\n"
        "def w(f): f.write(b'half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_with(sys.argv[1], w)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
