"""Reading untrusted files of tensors: torch.save's formats, old and new, and safetensors.

A file is opened once, so that the same bytes are checked, loaded and hashed even if another process
replaces the file. Refusing a file takes bounded time and memory.
"""

import contextlib
import hashlib
import io
import pickle
import pickletools
import re
import warnings
import zipfile

import safetensors.torch
import torch

from utils.files.regular import regular
from utils.program import InputError

MOST_BYTES = 2**36  # in a file
MOST_LEAVES = 200_000  # objects in a file (the optimiser of WRN-40-10 has some thousands)
MOST_DEPTH = 50  # levels of nested dictionaries and lists
MOST_PICKLED = 2**26  # bytes that describe the tensors (some hundred for each)
PLAIN = (str, int, float, complex, bool, bytes, torch.dtype, torch.device, type(None))
BEGINNINGS = (  # first bytes of files that people mistake for a checkpoint
    (b"<", "a failed download?"), (b"404", "a failed download?"), (b"{", "a failed download?"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with git lfs pull"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"))


class Damaged(InputError):
    """The file is cut short, altered or empty. An older copy of it may be fine."""


def read(path):
    """The content of a file of tensors, on the CPU. Nothing in it is executed.

    A one-line InputError if the file is missing, damaged (``Damaged``), of another kind, or holds
    anything but tensors and plain values (``weights_only=True``).
    """
    with refusing(path), regular(path, most=MOST_BYTES) as file:
        return content_of(file, path)


def read_hashed(path):
    """(content, SHA-256 of the file). Errors as for ``read``."""
    with refusing(path), regular(path, most=MOST_BYTES) as file:
        content = content_of(file, path)
        file.seek(0)
        return content, hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def refusing(path):
    """Turn any error of the block, which reads ``path``, into a one-line InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"no checkpoint {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: name a checkpoint file in it") from None
    except PermissionError:
        raise InputError(f"{path} cannot be read: permission denied") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise unpickling_fault(path, str(error)) from error
    except Exception as error:  # torch and zipfile raise many types on damaged bytes
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise InputError(f"{path} does not fit into memory") from None
        raise Damaged(f"{path} cannot be read as a checkpoint: it is cut short, damaged or of "
                      f"another kind [{one_line(error)}]") from error


def unpickling_fault(path, said):
    """The InputError for the message ``said`` of torch's restricted unpickler."""
    unsafe = re.search(r"GLOBAL (\S+)", said)
    if unsafe or "Can only" in said or "unrecognized function" in said:
        what = f"{unsafe[1]}, which is" if unsafe else ""
        return InputError(
            f"{path} is refused: it holds {what} more than tensors and plain values. If you trust "
            "it, save its weights alone: c = torch.load(FILE, weights_only=False); "
            "torch.save(c['state_dict'], NEW), with the name that its weights have there")
    reason = one_line(said.rpartition("WeightsUnpickler error:")[2])
    return Damaged(f"{path} cannot be read as a checkpoint: it is cut short, damaged or of another "
                   f"kind [{reason}]")


def content_of(file, path):
    """Load the open ``file``, checking it before and after."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(24)
    file.seek(0)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        content = safetensors.torch.load(file.read())
    else:
        if head.startswith(b"PK\x03\x04"):
            check_zip(file, path, size)
        elif head.startswith(b"\x80"):  # the format before PyTorch 1.6: five pickles, then bytes
            for _ in range(5):
                check_pickle(file, path)
        else:
            raise no_checkpoint(path, head)
        file.seek(0)
        with warnings.catch_warnings(action="ignore"):  # about tensors that are refused below
            content = torch.load(file, map_location="cpu", weights_only=True)
    check_content(content, path, size)
    return content


def no_checkpoint(path, head):
    """The error for a file whose first bytes ``head`` are not those of a file of tensors."""
    if not head:
        return Damaged(f"{path} is no PyTorch checkpoint: it is empty")
    why = next((f": {why}" for start, why in BEGINNINGS if head.startswith(start)), "")
    word = (head.split() or [head])[0][:12].decode("latin-1").encode("unicode_escape").decode()
    return Damaged(f"{path} is no PyTorch checkpoint (it begins with '{word}'{why})")


def check_zip(file, path, size):
    """InputError for a damaged or suspicious archive of ``size`` bytes.

    torch does not verify checksums. Compressed entries are refused, because they may expand without
    bound and torch never writes them.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise InputError(f"{path} is refused: two entries of one name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise InputError(f"{path} is refused: compressed entries, which torch never writes")
        if sum(entry.file_size for entry in entries) > size:
            raise InputError(f"{path} is refused: its entries are larger than the file")
        if damaged := archive.testzip():
            raise Damaged(f"{path} cannot be read as a checkpoint: {damaged} in it is damaged")
        for entry in entries:
            if entry.filename.rpartition("/")[2] == "data.pkl":
                if entry.file_size > MOST_PICKLED:
                    raise InputError(f"{path} is refused: it describes more than any network")
                check_pickle(io.BytesIO(archive.read(entry)), path)


def check_pickle(file, path):
    """InputError if the pickle at the file's position would take very long to load.

    The operations are not executed. They are followed to count how many objects each object
    contains when references are written out. Ten references to a tuple of ten references to a tuple
    of ten ... take few bytes. But hashing such a tuple, as a dictionary's key, visits all objects.
    """
    stack, memo, work = [], {}, 0  # the stack holds sizes, and None for a mark
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        name = operation.name
        if name == "MARK":
            stack.append(None)
        elif "PUT" in name:
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif "GET" in name:
            stack.append(memo[argument])
            work += memo[argument]
        else:
            taken, before = [], operation.stack_before
            if pickletools.markobject in before:
                before = before[:before.index(pickletools.markobject)]
                while (top := stack.pop()) is not None:
                    taken.append(top)
            taken += [stack.pop() for _ in before]
            whole = 1 + sum(taken)
            stack += [whole] * len(operation.stack_after)
            work += whole
        if count > 10 * MOST_LEAVES or work > 500 * MOST_LEAVES:
            raise InputError(f"{path} is refused: it holds more than {MOST_LEAVES:,} objects")


def check_content(content, path, size):
    """InputError if a sound file of ``size`` bytes cannot have this ``content``."""
    storages = {}
    try:
        for name, leaf in leaves(content):
            if isinstance(leaf, PLAIN):
                continue
            if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided or (
                    leaf.is_meta or leaf.is_quantized or leaf.is_nested):
                kind = getattr(leaf, "layout", type(leaf).__name__)
                raise InputError(f"{path} is refused: {name} is of a kind that is never saved "
                                 f"({kind})")
            storage = leaf.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            # a view with stride 0 can have any size
            if leaf.numel() * leaf.element_size() > storage.nbytes():
                raise InputError(f"{path} is refused: {name} is larger than what is stored of it")
    except ValueError as error:
        raise InputError(f"{path} is refused: it holds {error}") from error
    if sum(storages.values()) > size:
        raise InputError(f"{path} is refused: its tensors are larger than the file")


def leaves(value):
    """Yield (name, leaf) for nested dictionaries, lists and tuples, sorted by name.

    ValueError beyond MOST_LEAVES objects or MOST_DEPTH levels. A short pickle can describe more
    nested lists than any machine can walk through.
    """
    todo, seen = [("", 0, value)], 0
    while todo:
        name, depth, value = todo.pop()
        seen += 1
        if seen + len(todo) > MOST_LEAVES:
            raise ValueError(f"more than {MOST_LEAVES:,} objects")
        if depth > MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} levels of objects in each other")
        if isinstance(value, dict):
            todo += [(f"{name}/{key}", depth + 1, value[key])
                     for key in sorted(value, key=str, reverse=True)]
        elif isinstance(value, (list, tuple)):
            todo += [(f"{name}/{k}", depth + 1, part) for k, part in reversed([*enumerate(value)])]
        else:
            yield name, value


def one_line(error, length=160):
    """An exception's message in one short line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:length]
