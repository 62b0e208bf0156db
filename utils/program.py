"""What every program shares: exit codes, one clear line for bad input, and printing."""

import argparse
import contextlib
import importlib
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
    """Something the user typed or has on disk is wrong. The message says what to do about it."""

    of_one_process = False  # True if the other processes of the node do not see this error


class Unavailable(InputError):
    """A data set, weights file or package is missing. Whatever needs it is skipped."""


def needed(name):
    """The package ``name`` of requirements.txt. Unavailable if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise Unavailable(f"{name} is not installed: pip install -r requirements.txt") from None


def run(main):
    """Exit with ``main()``'s code. Bad input and file errors become one line and code 2."""
    threading.excepthook = quiet_thread
    start.open_streams()
    if signal.getsignal(signal.SIGINT) is start.quit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = exit_code(main, os.path.basename(sys.argv[0]))
    except Exception:  # a programming error: raised, or under torchrun its traceback is printed
        if not launched():
            raise
        traceback.print_exc()
        code = 1  # exit at once: the other processes should not report first that this one is gone
    if launched():
        sys.stderr.flush()
        os._exit(code)  # gloo's threads and the interpreter's shutdown can deadlock
    sys.exit(code)


def exit_code(main, program):
    """``main()``'s exit code. Errors of the user or the machine become one line and their code.

    Programming errors propagate.
    """
    try:
        code = main()
        sys.stdout.flush()
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0" and not error.of_one_process:
            time.sleep(3)  # rank 0 usually reports the same error, and torchrun then ends the rest
        complain(f"{program}: error: {error}")
        code = EXIT_INPUT
    except BrokenPipeError:  # the reader of our output closed it, as in "... | head"
        mute()
        code = 128 + 13  # as a shell reports SIGPIPE
    except KeyboardInterrupt:
        complain(f"{program}: interrupted: run the same command again")
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
            time.sleep(2)  # torchrun names the first process to exit as the cause
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
    """Print ``message`` in one line on standard error. Do nothing if that is closed."""
    with contextlib.suppress(OSError):
        print(shortened(message), file=sys.stderr, flush=True)


def shortened(message):
    """``message`` as one line of printable characters. Very long words are cut in the middle."""
    line = re.sub(r"\s+", " ", message).strip()
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    line = re.sub(r"\S{301,}", lambda word: f"{word[0][:40]}...{word[0][-20:]}", line)
    return line if len(line) <= 1200 else f"{line[:1000]} ... {line[-150:]}"


def launched():
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def refuse_torchrun(why):
    """InputError under torchrun, for scripts that run as a single process."""
    if launched():
        raise InputError(f"start it without torchrun: it {why}")


def lost_a_process(error):
    """Whether PyTorch's engine (gloo, NCCL or its store) gave up on a peer."""
    import torch.distributed as dist

    said = str(error).lower()  # all of gloo's messages contain its name but "pair closure"
    return dist.is_initialized() and (isinstance(error, dist.DistError)
                                      or "gloo" in said or "pair closure" in said)


def quiet_thread(fault):
    """Print a thread's error, except OSError: the main thread reports a full disk itself."""
    if not issubclass(fault.exc_type, OSError):
        sys.__excepthook__(fault.exc_type, fault.exc_value, fault.exc_traceback)


def say(message):
    """Print a line on rank 0. Work continues if standard output is closed or cannot be written."""
    if launched() and os.environ.get("RANK") != "0":
        return
    try:
        print(message, flush=True)
    except BrokenPipeError:
        mute()
    except OSError as error:  # the disk is full, or the terminal is gone
        mute()
        complain(f"standard output cannot be written ({error.strerror}): the work goes on")


def mute():
    """Discard standard output from here on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line that mentions --help."""

    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def parser(description):
    return Parser(description=description, allow_abbrev=False,
                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def path(text):
    """An argparse type: a path as a string, with ~ expanded to the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path: type a name (. is the current folder)")
    if not text.startswith("~"):  # the shell leaves ~ alone inside a word, as in --flag=~/x
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: no such home folder (a file of that name is "
                                         f"./{text})") from None
