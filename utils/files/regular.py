"""Opening a file that somebody named: a regular one, of bounded size, or one line of refusal."""

import os
import stat
from pathlib import Path

from utils.program import InputError

MOST_TEXT = 2**30  # bytes of a file of records: a thousand times those of the paper's run
KINDS = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
         (stat.S_ISBLK, "a device"))


def regular(path, mode="rb", most=MOST_TEXT):
    """Open ``path`` like ``open``, for reading or appending bytes.

    InputError for what is no regular file (a pipe waits for ever, a device never ends) and for one
    of more than ``most`` bytes; what the system says (no such file, a folder) is an OSError.
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
            check(Path(name).stat())  # first: opening by itself can wait or do something
        handle = os.open(name, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
        try:
            check(os.fstat(handle))
        except InputError:
            os.close(handle)
            raise
        return handle

    return open(path, mode, opener=opener)


def read_bytes(path, most=MOST_TEXT):
    """All that a regular file holds. InputError also where it does not fit into memory."""
    try:
        with regular(path, most=most) as file:
            return file.read()
    except MemoryError:
        raise InputError(f"{path} does not fit into memory") from None
