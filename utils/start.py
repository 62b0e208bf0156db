"""What a program does first of all, before it imports what takes seconds.

Only programs call ``begin``, and only as ``__main__``: importing a module changes nothing.
"""

import io
import os
import signal
import sys

INTERRUPTED = 128 + signal.SIGINT  # as a shell reports it


def begin():
    """Make standard streams, Ctrl-C and the user's folders such that the imports succeed."""
    open_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, quit_at_once)
    name_the_user()


def open_streams():
    """Standard streams that are there, and that write any character in any encoding."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed, as by 2>&-: the next file that is opened would get its number
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            os.set_inheritable(number, True)
            if null != number:
                os.close(null)
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's are something else
            stream.reconfigure(errors="backslashreplace")


def quit_at_once(number, frame):
    """Nothing has been begun: one line, where an exception would go through half-made modules."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode(errors="replace"))
    os._exit(INTERRUPTED)


def name_the_user():
    """Give libraries what they ask for at import: the user's name (torch), a home, and a folder
    for matplotlib's cache. A container may run as a user that its passwd file does not know."""
    import getpass  # here: Ctrl-C had to be taken over before
    from pathlib import Path

    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = f"uid{os.getuid()}"
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if home is not None and home.is_dir() and os.access(home, os.W_OK):
        return
    import tempfile

    try:
        spare = Path(tempfile.gettempdir()) / f"jempp-{getpass.getuser()}"
        spare.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return  # no folder can be written: what needs one will say so
    if home is None:
        os.environ["HOME"] = str(spare)
    os.environ.setdefault("MPLCONFIGDIR", str(spare))
    os.environ.setdefault("TRITON_CACHE_DIR", str(spare / "triton"))
