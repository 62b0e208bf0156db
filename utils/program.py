"""The frame of a program: exit codes, one clear line for bad input, and who speaks."""

import argparse
import os
import sys
import threading
import time
import traceback

EXIT_OK, EXIT_INPUT, EXIT_DIVERGED, EXIT_STOPPED = 0, 2, 3, 75


class InputError(Exception):
    """Something the user typed or has on disk is wrong; the message says what to do about it."""

    of_one_process = False  # of those of a node, where otherwise all find the same


class Unavailable(InputError):
    """Something that is not here now, a data set or a weights file; what needs it is left out."""


def run(main):
    """Exit with ``main()``'s code; bad input and file trouble become one line and code 2."""
    threading.excepthook = quiet_thread
    try:
        code = exit_code(main, os.path.basename(sys.argv[0]))
    except Exception:  # hidden from nobody: raised, or its traceback printed; only the exit is ours
        if not launched():
            raise
        traceback.print_exc()
        code = 1  # at once, or the others' word that this process is gone comes first
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's threads and the interpreter's end can wait for each other for ever
    sys.exit(code)


def exit_code(main, program):
    """``main()``'s code, or that of what went wrong, said in one line; what is no fault of the
    user's or the machine's is raised."""
    try:
        code = main()
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0" and not error.of_one_process:
            time.sleep(3)  # most are everybody's: torchrun ends us once the first has said it
        print(f"{program}: error: {error}", file=sys.stderr)
        code = EXIT_INPUT
    except BrokenPipeError:  # whoever read our output has read enough, as in "... | head"
        mute()
        code = 128 + 13  # as a shell reports SIGPIPE
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command starts over or goes on", file=sys.stderr)
        code = EXIT_STOPPED
    except RuntimeError as error:
        if lost_a_process(error):
            print(f"{program}: error: another process of this job is gone or silent: the same "
                  f"command goes on from the last checkpoint [{str(error).splitlines()[0][:120]}]",
                  file=sys.stderr)
            code = EXIT_STOPPED
            time.sleep(2)  # torchrun names as the cause whoever it sees gone first
        elif "allocate" in str(error) or "out of memory" in str(error):
            print(f"{program}: error: not enough memory: {str(error).splitlines()[0][:160]}",
                  file=sys.stderr)
            code = EXIT_INPUT
        else:
            raise
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"{program}: error: {error.strerror}{where}", file=sys.stderr)
        code = EXIT_INPUT
    return code


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


def mute():
    """Send standard output nowhere from here on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser(description):
    return argparse.ArgumentParser(description=description, allow_abbrev=False,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
