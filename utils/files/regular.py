"""Opening a file that the user named: a regular file of bounded size, or a one-line error."""

import os
import stat
from pathlib import Path

from utils.program import InputError

MOST_TEXT = 2**30  # bytes in a file of records, a thousand times those of the paper's run
KINDS = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
         (stat.S_ISBLK, "a device"))


def regular(path, mode="rb", most=MOST_TEXT):
    """Open ``path`` like ``open``, for reading or appending bytes.

    InputError for a file of more than ``most`` bytes, and for pipes, sockets and devices, whose
    reading can block or never end. OSError for a missing file or a folder.
    """
    def check(status):
        for is_kind, kind in KINDS:
            if is_kind(status.st_mode):
                raise InputError(f"{path} is {kind}, no file: name a regular file")
        if status.st_size > most and not stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path} has {status.st_size:,} bytes, more than any file of its kind "
                             f"({most:,})")

    def opener(name, flags):
        if Path(name).exists():
            check(Path(name).stat())  # before opening, which can block or have side effects
        handle = os.open(name, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
        try:
            check(os.fstat(handle))
        except InputError:
            os.close(handle)
            raise
        return handle

    return open(path, mode, opener=opener)


def read_bytes(path, most=MOST_TEXT):
    """The bytes of a regular file. Errors as for ``regular``, and InputError if memory runs out."""
    try:
        with regular(path, most=most) as file:
            return file.read()
    except MemoryError:
        raise InputError(f"{path} does not fit into memory") from None
