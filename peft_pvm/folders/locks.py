"""Advisory locks on files. They exclude processes and threads alike, and end with their holder, however it dies."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import warnings
from pathlib import Path


if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # some network file systems
POLL_SECONDS = 0.02


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
