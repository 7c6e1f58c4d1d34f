"""A claim on the folder of a run, so that two calls at once do not take each other's answers away.

Each process of a call holds the claim while it works, by a lock that the system lets go of when the
process ends, however it ends: processes that outlived their killed launcher still hold it. Where
there are no such locks (Windows, some network drives) nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

FILE = "lock"


class Claim:
    """The claim of one process.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[bytes] | None = None

    def alone(self) -> None:
        """Claims the folder where nobody else does, before anything is read or written.

        Raises:
            ValueError: another call is at work there.
        """
        if not self._lock(exclusive=True):
            self.release()
            raise ValueError(
                f"{self.folder}: another `itprune eval` is at work here, or processes of one whose "
                "launcher was killed; wait for it, end it, or name another --output"
            )

    def shared(self) -> None:
        """Claims the folder beside the other processes of this call."""
        self._lock(exclusive=False)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The claim outlives the block, but not an error in it."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Ends the claim."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lock(self, exclusive: bool) -> bool:
        """Whether nobody stands against it."""
        if fcntl is None:
            return True
        if self._file is None:
            self._file = self._opened()
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # a drive without locks
        return True

    def _opened(self) -> IO[bytes]:
        try:
            return (self.folder / FILE).open("ab")
        except OSError as error:
            raise ValueError(f"{self.folder}: cannot be written ({error.strerror})") from None
