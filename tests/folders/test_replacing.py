"""Whatever is written over something older: the folder holds the old or the new, and what else is in it stays."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fresh
import pytest
from fresh import needs_fork

from peft_pvm.folders.replacing import AREA, Lock, replacing, settle, write_file


FULL = "PEFT_PVM_KILL_OFTEN" in os.environ  # 60 kills of each writer and 200 races, which take ten minutes


def run_writers(mode: str, folder: Path, times: int, *writers: str) -> None:
    """In a process of its own, which has only one thread to be forked."""
    printed = fresh.run(fresh.TESTS / "writers.py", mode, folder, times, *writers)
    for writer, found in json.loads(printed.splitlines()[-1]).items():
        counts = Counter(found)
        print(writer, dict(counts))
        assert counts["old"] + counts["new"] == times, (writer, counts)


@needs_fork
def test_a_process_that_is_killed_leaves_the_old_or_the_new(tmp_path: Path):
    writers = "save_pretrained", "merge", "convert", "export-reference", "export-vllm", "json"
    run_writers("killed", tmp_path, 60 if FULL else 4, *writers)


@needs_fork
def test_two_processes_that_write_at_once_leave_no_mixture(tmp_path: Path):
    run_writers("racing", tmp_path, 200 if FULL else 8, "save_pretrained", "convert")


def write(folder: Path, content: str, names: tuple[str, ...] = ("entry", "other", "third")) -> None:
    with replacing(folder, entry="entry", outdated=lambda _: ["outdated"]) as staged:
        for name in names:
            (staged / name).write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def interrupt(monkeypatch: pytest.MonkeyPatch, functions: tuple[str, ...], step: int, action: Callable) -> None:
    """At the given call of functions of `os`, which move something, do something else."""
    calls = 0

    def counted(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            return action() if calls == step else function(*args, **kwargs)

        return call

    for name in functions:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def fail(*args, **kwargs) -> None:
    raise OSError("the disk fails")


@pytest.mark.parametrize("hard_links", [True, False])
def test_an_error_at_any_step_puts_the_old_files_back(tmp_path: Path, monkeypatch, hard_links: bool):
    if not hard_links:
        monkeypatch.setattr(os, "link", fail)
    for step in range(1, 30):
        folder = tmp_path / str(step)
        write(folder, "old", ("entry", "other"))
        (folder / "outdated").write_text("old")
        (folder / "mine").write_text("mine")
        with monkeypatch.context() as patch:
            interrupt(patch, ("replace",), step, fail)
            try:
                write(folder, "new")
            except OSError:
                assert contents(folder) == {"entry": "old", "other": "old", "outdated": "old", "mine": "mine"}
            else:
                break
        assert not (folder / AREA).exists()
    assert 5 < step < 29
    assert contents(folder) == {"entry": "new", "other": "new", "third": "new", "mine": "mine"}


@needs_fork
def test_a_process_that_dies_at_any_step_is_undone_by_the_next_reader(tmp_path: Path, monkeypatch):
    found = []
    for step in range(1, 40):
        folder = tmp_path / str(step)
        write(folder, "old", ("entry", "other"))
        (folder / "outdated").write_text("old")
        process = os.fork()
        if process == 0:
            interrupt(monkeypatch, ("replace", "link", "unlink", "fsync"), step, lambda: os._exit(9))
            write(folder, "new")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        settle(folder, "entry")
        assert list(folder.glob(".*")) == []
        found.append(contents(folder))
        if status == 0:
            break
    old = {"entry": "old", "other": "old", "outdated": "old"}
    new = {"entry": "new", "other": "new", "third": "new"}
    assert found == [old] * found.count(old) + [new] * found.count(new)
    assert min(found.count(old), found.count(new)) > 1


def test_what_a_living_process_is_writing_is_not_cleared(tmp_path: Path):
    with replacing(tmp_path, entry="entry") as staged:
        (staged / "entry").write_text("first")
        write(tmp_path, "second")
        settle(tmp_path, "entry")
        assert (staged / "entry").read_text() == "first"
    assert contents(tmp_path)["entry"] == "first"
    assert not (tmp_path / AREA).exists()


def test_other_files_are_not_touched(tmp_path: Path):
    """Also links, and what is edited while the save goes on."""
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    write(folder, "old")
    elsewhere.write_text("elsewhere")
    (folder / "link").symlink_to(elsewhere)
    (folder / "below").mkdir()
    (folder / "below" / "other").write_text("mine")
    (folder / "other").unlink()
    (folder / "other").symlink_to(elsewhere)
    (folder / "notes").write_text("before")
    kept = {name: (folder / name).lstat().st_ino for name in ("link", "below", "notes")}
    with replacing(folder, entry="entry") as staged:
        (staged / "entry").write_text("new")
        (staged / "other").write_text("new")
        (folder / "notes").write_text("meanwhile")
    assert {name: (folder / name).lstat().st_ino for name in kept} == kept
    assert (folder / "notes").read_text() == "meanwhile"
    assert (folder / "below" / "other").read_text() == "mine"
    assert (folder / "other").read_text() == "new"
    assert elsewhere.read_text() == "elsewhere", "nothing is written through a link"


def test_a_file_that_is_the_same_stays_and_permissions_stay(tmp_path: Path):
    write(tmp_path, "old")
    os.chmod(tmp_path / "other", 0o640)
    before = (tmp_path / "entry").stat().st_ino
    with replacing(tmp_path, entry="entry") as staged:
        (staged / "entry").write_text("old")
        (staged / "other").write_text("new")
    assert (tmp_path / "entry").stat().st_ino == before
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "other").read_text() == "new"


@pytest.fixture
def other_file_system() -> Iterator[Path]:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("no second file system here")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_a_link_to_another_file_system_is_followed(tmp_path: Path, other_file_system: Path):
    (tmp_path / "folder").symlink_to(other_file_system)
    write(tmp_path / "folder", "old")
    write(tmp_path / "folder", "new")
    assert (tmp_path / "folder").is_symlink()
    assert contents(other_file_system) == dict.fromkeys(("entry", "other", "third"), "new")


def test_a_part_on_another_file_system(tmp_path: Path, other_file_system: Path):
    (tmp_path / "part").symlink_to(other_file_system)
    with replacing(tmp_path, entry="entry") as staged:
        (staged / "part").mkdir()
        for name in ("entry", "other"):
            (staged / "part" / name).write_text("new")
    assert contents(other_file_system) == {"entry": "new", "other": "new"}
    assert (tmp_path / "part").is_symlink()


@needs_fork
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes another user, which only root can"
)
def test_a_parent_that_cannot_be_written_to():
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:  # which another user can enter
        folder = Path(parent) / "folder"
        folder.mkdir()
        os.chown(folder, 65534, 65534)
        os.chmod(parent, 0o755)
        process = os.fork()
        if process == 0:
            os.setuid(65534)
            write(folder, "old")
            write(folder, "new")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        assert contents(folder)["entry"] == "new"


def test_what_is_in_the_way_is_named(tmp_path: Path):
    write(tmp_path, "old", ("entry",))
    (tmp_path / "other").mkdir()
    with pytest.raises(IsADirectoryError, match=r"other is a folder, but a file is to be written there"):
        write(tmp_path, "new")
    assert contents(tmp_path) == {"entry": "old"}
    with pytest.raises(NotADirectoryError, match=r"entry is a file, but a folder is to be written there"):
        write(tmp_path / "entry", "new")


def test_a_failure_leaves_no_folders_behind(tmp_path: Path):
    def write_half() -> None:
        with replacing(tmp_path / "a" / "b", entry="entry") as staged:
            (staged / "entry").write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_half()
    assert not list(tmp_path.iterdir())


def test_a_file_by_itself(tmp_path: Path):
    write_file(tmp_path / "new" / "results.json", "é")
    assert (tmp_path / "new" / "results.json").read_bytes() == "é".encode()
    (tmp_path / "link").symlink_to(tmp_path / "new" / "results.json")
    write_file(tmp_path / "link", b"through the link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new" / "results.json").read_bytes() == b"through the link"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "new", "results.json"]


@needs_fork
def test_a_file_that_is_a_pipe(tmp_path: Path):
    """As in `--plot /dev/stdout`."""
    os.mkfifo(tmp_path / "pipe")
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    read: list[str] = []
    reader.start()
    write_file(tmp_path / "pipe", "text")
    reader.join(timeout=120)
    assert read == ["text"]


def test_threads_exclude_each_other(tmp_path: Path):
    """Each thread writes its number into two files, a hundred times in all."""

    def write_often(number: int) -> None:
        for _ in range(25):
            write(tmp_path, str(number))

    threads = [threading.Thread(target=write_often, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        settle(tmp_path, "entry")
    assert len(set(contents(tmp_path).values())) == 1
    assert list(tmp_path.glob(".*")) == []


def test_a_lock_whose_file_was_removed_is_taken_again(tmp_path: Path):
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert first.acquire()
    assert not second.acquire(wait=False)
    waiting = threading.Thread(target=second.acquire)
    waiting.start()
    first.release(remove=True)
    waiting.join(timeout=120)
    assert (tmp_path / "lock").exists(), "the one that waited has made a new file"
    assert not Lock(tmp_path / "lock").acquire(wait=False)
    second.release()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="Windows locks in another way")

    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="has no file locks"):
        write(tmp_path, "new")
    assert contents(tmp_path)["entry"] == "new"
    assert list(tmp_path.glob(".*")) == []


def test_what_a_dead_process_left_on_a_read_only_file_system_hinders_nobody(tmp_path: Path, monkeypatch):
    (tmp_path / "entry").write_text("whole")
    (tmp_path / AREA / "dead").mkdir(parents=True)
    opened = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", path)
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    assert settle(tmp_path, "entry")
    assert not settle(tmp_path, "another")


def test_old_files_that_cannot_be_put_back_at_once_are_put_back_later(tmp_path: Path, monkeypatch):
    write(tmp_path, "old")
    with monkeypatch.context() as patch:
        replace, calls = os.replace, []

        def fail_from_the_third_on(*args):
            calls.append(args)
            return fail() if len(calls) > 2 else replace(*args)

        patch.setattr(os, "replace", fail_from_the_third_on)
        with pytest.raises(OSError, match="the disk fails"):
            write(tmp_path, "new")
    assert "entry" not in contents(tmp_path), "half of it is not taken for the whole"
    settle(tmp_path, "entry")
    assert contents(tmp_path) == dict.fromkeys(("entry", "other", "third"), "old")
    assert list(tmp_path.glob(".*")) == []
