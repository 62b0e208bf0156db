"""The first thing that a program does, before imports that take seconds.

Programs call ``begin`` under ``__main__`` only, so importing a module changes nothing.
"""

import io
import os
import signal
import sys

INTERRUPTED = 128 + signal.SIGINT  # as a shell reports it


def begin():
    """Set up standard streams, Ctrl-C and the user's folders, so that the imports succeed."""
    open_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, quit_at_once)
    name_the_user()


def open_streams():
    """Make sure that the standard streams exist and can write any character in any encoding."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed, as by 2>&-: the next opened file would get this number
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            os.set_inheritable(number, True)
            if null != number:
                os.close(null)
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not so in notebooks
            stream.reconfigure(errors="backslashreplace")


def quit_at_once(number, frame):
    """Handle Ctrl-C during imports: print one line and exit, as no work has begun.

    An exception would pass through half-imported modules.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode(errors="replace"))
    os._exit(INTERRUPTED)


def name_the_user():
    """Set the user's name (torch needs it), a home folder, and matplotlib's and Triton's caches.

    A container may run as a user that is missing from its passwd file.
    """
    import getpass  # here, because Ctrl-C must be handled before any import
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
        return  # no folder is writable: whatever needs one reports it
    if home is None:
        os.environ["HOME"] = str(spare)
    os.environ.setdefault("MPLCONFIGDIR", str(spare))
    os.environ.setdefault("TRITON_CACHE_DIR", str(spare / "triton"))
