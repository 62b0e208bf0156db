"""Reading files that torch.save wrote, whoever wrote them."""

import pickle
import zipfile

import torch

from utils.cli import InputError


def read(path):
    """The content of a checkpoint file, on the CPU. Nothing in it is executed.

    InputError, in one line, for a file that is missing, cut short, damaged, of another kind, or
    that holds anything but tensors and plain values (``weights_only=True``).
    """
    check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, tensor in tensors(content):  # a view of few bytes can pretend to be of any size
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
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


def tensors(value, name=""):
    """(name, tensor) of every tensor in nested dictionaries and lists, names in sorted order."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors(value[key], f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for key, part in enumerate(value):
            yield from tensors(part, f"{name}/{key}")


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
