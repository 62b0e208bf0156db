"""The frame of a program: exit codes, one clear line for bad input, and who speaks."""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from utils import start

EXIT_OK, EXIT_INPUT, EXIT_DIVERGED, EXIT_STOPPED = 0, 2, 3, 75


class InputError(Exception):
    """Something the user typed or has on disk is wrong; the message says what to do about it."""

    of_one_process = False  # of those of a node, where otherwise all find the same


class Unavailable(InputError):
    """Something that is not here now, a data set or a weights file; what needs it is left out."""


def run(main):
    """Exit with ``main()``'s code; bad input and file trouble become one line and code 2."""
    threading.excepthook = quiet_thread
    start.open_streams()
    if signal.getsignal(signal.SIGINT) is start.quit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = exit_code(main, os.path.basename(sys.argv[0]))
    except Exception:  # hidden from nobody: raised, or its traceback printed; only the exit is ours
        if not launched():
            raise
        traceback.print_exc()
        code = 1  # at once, or the others' word that this process is gone comes first
    if launched():
        sys.stderr.flush()
        os._exit(code)  # gloo's threads and the interpreter's end can wait for each other for ever
    sys.exit(code)


def exit_code(main, program):
    """``main()``'s code, or that of what went wrong, said in one line; what is no fault of the
    user's or the machine's is raised."""
    try:
        code = main()
        sys.stdout.flush()
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0" and not error.of_one_process:
            time.sleep(3)  # most are everybody's: torchrun ends us once the first has said it
        complain(f"{program}: error: {error}")
        code = EXIT_INPUT
    except BrokenPipeError:  # whoever read our output has read enough, as in "... | head"
        mute()
        code = 128 + 13  # as a shell reports SIGPIPE
    except KeyboardInterrupt:
        complain(f"{program}: interrupted; the same command starts over or goes on")
        code = start.INTERRUPTED
    except MemoryError as error:
        complain(f"{program}: error: not enough memory: {str(error) or 'Python has none left'}")
        code = EXIT_INPUT
    except RuntimeError as error:
        if lost_a_process(error):
            first_line = str(error).splitlines()[0][:120]
            complain(f"{program}: error: another process of this job is gone or silent: the same "
                     f"command goes on from the last checkpoint [{first_line}]")
            code = EXIT_STOPPED
            time.sleep(2)  # torchrun names as the cause whoever it sees gone first
        elif "allocate" in str(error) or "out of memory" in str(error):
            complain(f"{program}: error: not enough memory: {str(error).splitlines()[0][:160]}")
            code = EXIT_INPUT
        else:
            raise
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
        complain(f"{program}: error: {error.strerror}{where}")
        code = EXIT_INPUT
    return code


def complain(message):
    """One line on standard error, however odd what was typed; or none, where nobody reads it."""
    with contextlib.suppress(OSError):
        print(shortened(message), file=sys.stderr, flush=True)


def shortened(message):
    """``message`` in one line of what can be printed, its longest words cut in the middle."""
    line = re.sub(r"\s+", " ", message).strip()
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    line = re.sub(r"\S{301,}", lambda word: f"{word[0][:40]}...{word[0][-20:]}", line)
    return line if len(line) <= 1200 else f"{line[:1000]} ... {line[-150:]}"


def launched():
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def refuse_torchrun(why):
    """For scripts that are one process by nature."""
    if launched():
        raise InputError(f"start it without torchrun: it {why}")


def lost_a_process(error):
    """Whether PyTorch's engine (gloo, NCCL or its store) gave up on a peer."""
    import torch.distributed as dist

    said = str(error).lower()  # gloo names itself in all messages but that of a pair's closure
    return dist.is_initialized() and (isinstance(error, dist.DistError)
                                      or "gloo" in said or "pair closure" in said)


def quiet_thread(fault):
    """A disk that is full for a helper thread (TensorBoard's) is full for us, and we say so."""
    if not issubclass(fault.exc_type, OSError):
        sys.__excepthook__(fault.exc_type, fault.exc_value, fault.exc_traceback)


def say(message):
    """Print a line for whoever is watching; work goes on when nobody is any more. Of several
    processes, the first speaks."""
    if launched() and os.environ.get("RANK") != "0":
        return
    try:
        print(message, flush=True)
    except BrokenPipeError:
        mute()
    except OSError as error:  # a full disk below it, or a terminal that is gone
        mute()
        complain(f"standard output cannot be written ({error.strerror}): the work goes on")


def mute():
    """Send standard output nowhere from here on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """Argparse's, whose complaint is one line and names --help."""

    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def parser(description):
    return Parser(description=description, allow_abbrev=False,
                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def path(text):
    """An argparse type: a path, in which ~ is the home folder, as a string."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path: type a name (. is the current folder)")
    if not text.startswith("~"):  # which the shell expands at a word's beginning alone
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: no such home folder (a file of that name is "
                                         f"./{text})") from None
