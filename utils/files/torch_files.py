"""Reading files that torch.save wrote, whoever wrote them."""

import pickle
import zipfile

import torch

from utils.program import InputError

MOST_LEAVES = 1_000_000  # objects in a file: the optimiser of WRN-40-10 comes to some thousands


def read(path):
    """The content of a checkpoint file, on the CPU. Nothing in it is executed.

    InputError, in one line, for a file that is missing, cut short, damaged, of another kind, or
    that holds anything but tensors and plain values (``weights_only=True``).
    """
    check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, leaf in leaves(content):  # a view of few bytes can pretend to be of any size
            if (isinstance(leaf, torch.Tensor)
                    and leaf.numel() * leaf.element_size() > leaf.untyped_storage().nbytes()):
                raise InputError(f"{path} is refused: {name} is larger than what is stored of it")
        return content
    except FileNotFoundError:
        raise InputError(f"no checkpoint {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: name a checkpoint file in it") from None
    except PermissionError:
        raise InputError(f"{path} may not be read: permission denied") from None
    except pickle.UnpicklingError as error:
        unsafe = "Unsupported global" in str(error) or "weights_only" in str(error)
        reason = "it holds more than tensors and plain values" if unsafe else one_line(error)
        raise InputError(f"{path} is refused: {reason}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError,
            IndexError, OverflowError, MemoryError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as a checkpoint: it is cut short, damaged or of "
                         f"another kind [{one_line(error)}]") from error


def leaves(value):
    """(name, leaf) of all that nested dictionaries, lists and tuples hold, names in sorted order.

    ValueError beyond MOST_LEAVES objects: a few bytes of pickle can stand for more lists in lists
    than any machine can walk through.
    """
    todo, seen = [("", value)], 0
    while todo:
        name, value = todo.pop()
        seen += 1
        if seen > MOST_LEAVES:
            raise ValueError(f"more than {MOST_LEAVES:,} objects")
        if isinstance(value, dict):
            todo += [(f"{name}/{key}", value[key]) for key in sorted(value, key=str, reverse=True)]
        elif isinstance(value, (list, tuple)):
            todo += [(f"{name}/{k}", part) for k, part in reversed(list(enumerate(value)))]
        else:
            yield name, value


def check_zip(path):
    """InputError for a damaged or suspicious archive. torch checks no checksums, and a compressed
    entry (torch writes none) may grow without bound as it is read."""
    if not zipfile.is_zipfile(path):
        return  # the format before torch 1.6, or no checkpoint at all: torch.load tells
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len({entry.filename for entry in entries}) < len(entries):
                raise InputError(f"{path} is refused: two entries of one name")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise InputError(f"{path} is refused: compressed entries, which torch never writes")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError, NotImplementedError,
            EOFError) as error:
        raise InputError(f"{path} cannot be read as a checkpoint: it is cut short or damaged "
                         f"[{one_line(error)}]") from error
    if damaged:
        raise InputError(f"{path} cannot be read as a checkpoint: {damaged} in it is damaged")


def one_line(error, length=160):
    """An exception's message in one short line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:length]
