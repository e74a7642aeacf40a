"""Replacing files in a folder all at once, also if other processes write there or a process dies meanwhile.

New files are first completed in a hidden folder inside the target, so on its file system. Then they take their places
under a lock. A single file does so in one step. For several, a note of what they replace is made first. If the process
dies in between, whoever next takes the lock finds the note and puts the old files back.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import os
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


AREA = ".peft-pvm-saving"  # in the folder that is written to, while somebody does
LOCK, ALIVE, PLAN = "lock", "alive", "plan.json"
COMPARED_BYTES = 2**20  # up to this size, files with the same content are left as they are
NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # some network file systems
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class _Staged:
    """Files that are to take their places in a folder, `target`. The other fields are arguments of `replacing`.

    Attributes:
        own: The hidden folder of this process, for the new files, the old ones and the note.
    """

    target: Path
    own: Path
    entry: str
    outdated: Callable[[Path], Iterable[str]]
    stays: Callable[[Path], bool]

    @property
    def folder(self) -> Path:
        """The folder of the new files until they take their places."""
        return _staged(self.own, self.target)


@contextlib.contextmanager
def replacing(
    folder: str | os.PathLike,
    entry: str,
    outdated: Callable[[Path], Iterable[str]] = lambda folder: (),
    stays: Callable[[Path], bool] = lambda path: False,
) -> Iterator[Path]:
    """Write files into a folder so that it holds the old ones or the new ones, never some of each.

    A process that dies leaves the old files or the new ones. Other files in the folder are not touched. Several
    processes and threads may write to one folder: the last one wins. Sub-folders are written the same way, each on its
    own.

    Args:
        folder: Where the files are to be. It is made if it does not exist. A link is followed.
        entry: Name of the file without which nothing reads the others. It goes first and comes last, so that nobody
            takes files of two kinds for one thing.
        outdated: Names of files that the new ones make obsolete, from the folder as it is then.
        stays: Whether a file that is there, by its path, keeps its place.

    Yields:
        A folder of the same name, to write to.

    Raises:
        IsADirectoryError: There is a folder where a file is to be.
        NotADirectoryError: There is a file where the folder is to be.
        OSError: The folder cannot be written to. The old files are as they were.
    """
    folder = Path(os.path.realpath(folder))
    if is_staged(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, but a folder is to be written there. Name another.")
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    with _locked_area(folder) as area:
        own = area / uuid.uuid4().hex
        files = _Staged(folder, own, entry, outdated, stays)
        files.folder.mkdir(parents=True)
        alive = Lock(own / ALIVE)
        alive.acquire()
    try:
        yield files.folder
        _place_all(files)
    finally:
        with _locked_area(folder):
            alive.release()
            if not (own / PLAN).exists():  # else the old files are still there, and the next one puts them back
                shutil.rmtree(own, ignore_errors=True)
        for path in absent:
            with contextlib.suppress(OSError):  # where something was written
                path.rmdir()


def is_staged(path: Path) -> bool:
    """Whether a path is inside what is being written already."""
    return AREA in path.parts


def write_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Write one file so that it holds the old content or the new, never a part.

    Args:
        path: The file. A link is followed.
        content: Text is written as UTF-8.

    Raises:
        OSError: It cannot be written. The old content is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_bytes(data)
        return
    with replacing(path.parent, entry=path.name) as staged:
        (staged / path.name).write_bytes(data)


def settle(folder: str | os.PathLike, entry: str) -> bool:
    """Wait until nobody is replacing files in a folder, and undo what a dead process left half done.

    Args:
        folder: The folder.
        entry: A file in it.

    Returns:
        Whether the file is there then.
    """
    folder = Path(os.path.realpath(folder))
    try:
        with _locked_area(folder) if (folder / AREA).is_dir() else contextlib.nullcontext():
            return (folder / entry).is_file()
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return (folder / entry).is_file()  # nobody writes here, and nothing can be undone


@contextlib.contextmanager
def _locked_area(folder: Path) -> Iterator[Path]:
    """Lock the hidden folder, without what dead processes left there. It is removed when nobody needs it any more."""
    area = folder / AREA
    lock = Lock(area / LOCK)
    for attempts_left in reversed(range(1000)):
        try:
            area.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            break
        except (FileNotFoundError, FileExistsError):  # somebody who no longer needed it has just removed it
            if not attempts_left:
                raise
    try:
        _clear(folder, area)
        yield area
    finally:
        lock.release(remove=not area.is_dir() or os.listdir(area) == [LOCK])
        with contextlib.suppress(OSError):  # where others still write
            area.rmdir()


def _clear(folder: Path, area: Path) -> None:
    """Undo and remove what dead processes left. Running processes hold a lock."""
    for own in [path for path in area.iterdir() if path.is_dir()]:
        alive = Lock(own / ALIVE)
        try:
            if not alive.acquire(wait=False):
                continue
        except PermissionError:  # of another user, whose process may be running
            continue
        try:
            _put_back(folder, own)
        finally:
            alive.release()
        shutil.rmtree(own, ignore_errors=True)


def _staged(own: Path, folder: Path) -> Path:
    return own / "new" / (folder.name or "root")


def _place_all(files: _Staged) -> None:
    """Move the staged files to their places, also those in staged sub-folders."""
    staged = files.folder
    with contextlib.ExitStack() as below:
        for part in [path for path in staged.iterdir() if path.is_dir()]:
            into = below.enter_context(replacing(files.target / part.name, files.entry, files.outdated, files.stays))
            for path in part.iterdir():
                shutil.move(path, into / path.name)  # which may be on another file system
            part.rmdir()
        for path in staged.iterdir():
            _sync(path)
        with _locked_area(files.target):
            _place(files)


def _place(files: _Staged) -> None:
    """Move the staged files to their places, all or none."""
    folder, own, staged, entry, old = files.target, files.own, files.folder, files.entry, files.own / "old"
    written = sorted(path.name for path in staged.iterdir())
    changed = [name for name in written if not _is_kept(folder / name, staged / name, files.stays)]
    obsolete = [name for name in sorted(set(files.outdated(folder)) - set(written)) if os.path.lexists(folder / name)]
    for name in [*changed, *obsolete]:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder, but a file is to be written there. Move it away.")
        if name in changed and (folder / name).is_file():
            shutil.copymode(folder / name, staged / name)
    if len(changed) + len(obsolete) > 1:
        if entry in written and entry not in changed:
            changed.append(entry)
        replaced = [*obsolete, *(name for name in changed if os.path.lexists(folder / name))]
        old.mkdir()
        plan = {"entry": entry, "changed": changed, "replaced": replaced}
        (own / "plan.new").write_text(json.dumps(plan), encoding="utf-8")
        _sync(own / "plan.new")
        os.replace(own / "plan.new", own / PLAN)
        _sync(own)
        try:
            for name in sorted(replaced, key=lambda name: name != entry):
                _keep(folder / name, old / name, move=name == entry or name in obsolete)
            for name in sorted(changed, key=lambda name: name == entry):
                os.replace(staged / name, folder / name)
        except BaseException:
            _put_back(folder, own)
            raise
        (own / PLAN).unlink()
    else:
        for name in changed:
            os.replace(staged / name, folder / name)
        for name in obsolete:
            (folder / name).unlink()
    _sync(folder)


def _is_kept(place: Path, new: Path, stays: Callable[[Path], bool]) -> bool:
    """Whether an existing file stays, because it belongs to somebody or the new one is the same."""
    if not place.is_file():
        return False
    is_small = place.stat().st_size == new.stat().st_size <= COMPARED_BYTES
    return stays(place) or (is_small and filecmp.cmp(place, new, shallow=False))


def _keep(path: Path, kept: Path, move: bool) -> None:
    if not move and not path.is_symlink():
        with contextlib.suppress(OSError):  # where there are no hard links
            os.link(path, kept)
            return
    os.replace(path, kept)


def _put_back(folder: Path, own: Path) -> None:
    """Put the old files back, unless all new ones are in their places. Doing it twice does no harm."""
    if not (own / PLAN).is_file():
        return
    plan = json.loads((own / PLAN).read_text(encoding="utf-8"))
    staged, old, entry = _staged(own, folder), own / "old", plan["entry"]
    if entry not in plan["changed"] or (staged / entry).exists():  # the entry came last
        for name in set(plan["changed"]) - set(plan["replaced"]):
            if not (staged / name).exists():
                (folder / name).unlink(missing_ok=True)
        for name in sorted(plan["replaced"], key=lambda name: name == entry):
            if os.path.lexists(old / name):
                os.replace(old / name, folder / name)
        _sync(folder)
    (own / PLAN).unlink()


def _sync(path: Path) -> None:
    """Flush what was written to a file, or moved in a folder, to the disk."""
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


class Lock:
    """A lock on a file, which is made if it is not there.

    Args:
        path: The file. Its content does not matter.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock.

        A file system may have no locks. Then a lock that is waited for counts as taken, with a warning. One that is
        not waited for counts as held by somebody else.

        Args:
            wait: Until it is free.

        Returns:
            Whether it is taken; with `wait` always.

        Raises:
            OSError: The file cannot be opened.
        """
        while True:
            descriptor = self._open()
            try:
                taken = self._lock(descriptor, wait)
                # Its last holder may have removed the file, and somebody else made a new one.
                if taken and os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    self._descriptor = descriptor
                    return True
            except FileNotFoundError:
                pass
            finally:
                if self._descriptor != descriptor:
                    os.close(descriptor)
            if not taken:
                return False

    def release(self, remove: bool = False) -> None:
        """Let go of the lock.

        Args:
            remove: Remove the file as well. Whoever waits for it makes a new one.
        """
        if self._descriptor is None:
            return
        if remove and sys.platform != "win32":
            with contextlib.suppress(OSError):  # a file that remains does no harm
                self.path.unlink()  # while it is held: whoever opened it before will notice
        self._unlock(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None
        if remove and sys.platform == "win32":
            with contextlib.suppress(OSError):  # where others have opened it, it stays
                self.path.unlink()

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's
            return os.open(self.path, os.O_RDONLY)

    if sys.platform == "win32":

        def _lock(self, descriptor: int, wait: bool) -> bool:
            while True:
                try:
                    msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                except OSError:
                    if not wait:
                        return False
                    time.sleep(POLL_SECONDS)
                else:
                    return True

        def _unlock(self, descriptor: int) -> None:
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

    else:

        def _lock(self, descriptor: int, wait: bool) -> bool:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in NO_LOCKS_HERE:
                    raise
                if wait:
                    warnings.warn(
                        f"The file system of {self.path.parent} has no file locks ({error.strerror}). Let only one "
                        "process at a time save into this folder: two could mix their files.",
                        stacklevel=2,
                    )
                return wait
            return True

        def _unlock(self, descriptor: int) -> None:
            with contextlib.suppress(OSError):  # where there are no locks
                fcntl.flock(descriptor, fcntl.LOCK_UN)
