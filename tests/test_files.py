"""Whole or not at all: also when the disk is full, when the process dies, and when a library does the writing."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dino.machine.files import printable, remove_partial, whole_file, write_text
from dino.machine.progress import ahead


def test_the_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with whole_file(path) as partial:
        partial.write_text("new")
        assert partial.suffix == ".txt"
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_whoever_may_read_other_files_may_read_it(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "own")
    (tmp_path / "plain").touch()
    with whole_file(tmp_path / "shared") as partial:
        save_file({"a": torch.zeros(2)}, partial)
    own, plain, shared = ((tmp_path / name).stat().st_mode & 0o777 for name in ("own", "plain", "shared"))
    assert shared == plain
    assert own in (0o600, plain)  # Where safetensors asks the umask itself, nothing was to be mended.


@pytest.mark.parametrize("moment", ["write_text", "fsync", "replace"])
def test_a_failure_leaves_what_was_there(moment, tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "whatever")

    with monkeypatch.context() as patch:
        patch.setattr(Path if moment == "write_text" else os, moment, full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            write_text(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(KeyError), whole_file(tmp_path / "file"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_file_and_folder_are_on_the_disk_before_it_is_said(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    write_text(tmp_path / "file.txt", "text")
    first, second = synced
    assert Path(first).name.endswith("file.txt")
    assert Path(second) == tmp_path


def test_a_disk_that_is_full_in_a_library_of_another_language_is_the_same_error(tmp_path):
    """safetensors writes by itself, and has the reason in its text alone: here it may write 4 KiB."""
    script = f"""
import resource, signal, torch
from pathlib import Path
from safetensors.torch import save_file
from dino.machine.files import whole_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with whole_file(Path({str(tmp_path / "x.safetensors")!r})) as partial:
        save_file({{"x": torch.zeros(100000)}}, partial)
except OSError as error:
    print(error.errno, error.filename)
"""
    source = Path(__file__).parents[1] / "src"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(source)}
    )
    assert done.stdout == f"{errno.EFBIG} {tmp_path / 'x.safetensors'}\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_the_dead_left_is_removed(tmp_path):
    with whole_file(tmp_path / "kept.safetensors") as partial:
        save_file({"x": torch.zeros(3)}, partial)
        (tmp_path / partial.name.replace(str(os.getpid()), "1")).write_bytes(b"half")
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


def test_names_are_shown_in_one_line(tmp_path):
    name = os.fsdecode(b"line\nfeed\x1b[31m\xff.png")
    assert printable(name) == "line\\nfeed\\x1b[31m\\xff.png"
    write_text(tmp_path / "list", printable(name))
    assert printable("ordinary näme 漢.jpg") == "ordinary näme 漢.jpg"


def test_items_made_ahead_come_in_order_and_no_further_than_asked():
    made = []

    def make(i: int) -> int:
        made.append(i)
        return -i

    items = ahead(make, range(50), count=3)
    assert next(items) == 0
    items.close()
    assert len(made) <= 5
    assert list(ahead(make, range(7), threads=3)) == [0, -1, -2, -3, -4, -5, -6]
    assert list(ahead(make, [])) == []


def test_an_error_ahead_comes_in_its_turn():
    items = ahead(lambda i: 1 // i, [1, 0, 1])
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError):
        next(items)
