"""Your own data sets: ``folder:PATH``, a folder of pictures per class, and ``npz:FILE``, arrays.

A folder holds PATH/train/CLASS/* and PATH/test/CLASS/*, and optionally validation images in val/ or
valid/. Or it holds PATH/CLASS/*, and a fifth of the images, drawn by a fixed seed, is the test
split. A file holds x_train, y_train, x_test, y_test, and optionally x_valid, y_valid. Its images
are uint8 [N, H, W, C], [N, C, H, W] or [N, H, W] with 1 or 3 channels, its labels 0 .. K-1.

Images are cropped to the centre square and resized with antialiasing. Grey becomes RGB.
"""

import hashlib
import json
import math
import os
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from utils import distributed, image_folder
from utils.files.records import replacing
from utils.image_folder import memory, subfolders, warn
from utils.program import InputError

KINDS = ("folder:", "npz:")
SPLITS = ("train", "test", "val", "valid")
TEST_SHARE = 5  # one image in five, if a folder has no test split
MOST_CLASSES = 100_000
BROKEN = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error,
          NotImplementedError)  # raised by reading a damaged .npz, or another kind of file


def is_own(name):
    """Whether ``name`` is of the form ``folder:PATH`` or ``npz:FILE``."""
    return name.startswith(KINDS)


def path_of(name):
    """The path in ``folder:PATH`` or ``npz:FILE``."""
    path = name.partition(":")[2]
    if not path:
        raise InputError(f"{name} names no path")
    return Path(path).expanduser()


def class_names(name):
    """The names of a data set's classes, without reading its images.

    They are the folders' names, sorted as in torchvision, or a file's label numbers. InputError if
    the path holds no data set.
    """
    path = path_of(name)
    if name.startswith("npz:"):
        return tuple(str(k) for k in range(int(labels(path, "y_train").max()) + 1))
    names = subfolders(next(iter(split_folders(path).values())))
    return tuple(os.fsencode(n).decode(errors="replace") for n in names)


def load(name, size, root):
    """({split: (x uint8 [n, 3, size, size], y int64 [n])}, notes for the records).

    The splits are "train", "test" and perhaps "valid". The last two are shuffled by a fixed seed,
    because evaluations take the first n, and a folder's come class by class. Decoded folders are
    cached under ``root``.
    """
    path, names = path_of(name), class_names(name)
    if name.startswith("npz:"):
        splits, about = load_npz(path, size), {}
    else:
        splits, about = load_folder(path, size, root)
    for split, (_, y) in splits.items():
        if not len(y):
            raise InputError(f"{name}: the {split} split has no image that can be read")
        if y.max() >= len(names):
            raise InputError(f"{name}: y_{split} has label {y.max()}, y_train none above "
                             f"{len(names) - 1}")
    if len(empty := set(range(len(names))) - set(splits["train"][1].tolist())):
        raise InputError(f"{name}: class {names[min(empty)]!r} has no training image that can be "
                         "read")
    return {split: part if split == "train" else shuffled(*part)
            for split, part in splits.items()}, about


def shuffled(*arrays):
    """Tensors of one length, all in the same order, which their length decides."""
    order = torch.from_numpy(image_folder.fixed_order(len(arrays[0])))
    return tuple(array[order] for array in arrays)


def sets_aside(name):
    """Whether ``name`` is a folder without splits, of which ``load`` sets a fifth aside."""
    return name.startswith("folder:") and "all" in split_folders(path_of(name))


# Folders

def split_folders(path):
    """{split: its folder} of a data set, or {"all": path} if it has no splits."""
    if not path.is_dir():
        raise InputError(f"folder:{path} is no folder")
    inside = subfolders(path)
    if "train" in inside and subfolders(path / "train"):
        if "test" not in inside:
            raise InputError(f"folder:{path} has train/ and no test/: put a test split there, or "
                             "the class folders into one folder (a fifth is then set aside)")
        if {"val", "valid"} <= set(inside):
            raise InputError(f"folder:{path} has val/ and valid/: keep one of them")
        folders = {"valid" if s.startswith("val") else s: path / s for s in SPLITS if s in inside}
    else:
        folders = {"all": path}
    classes = subfolders(next(iter(folders.values())))
    splits_alone = {name.lower() for name in inside} <= {*SPLITS, "validation"}
    if len(classes) < 2 or splits_alone and "all" in folders:
        found = ", ".join(classes) if classes else "no folder"
        raise InputError(f"folder:{path} needs a folder for each of two or more classes, "
                         f"CLASS/* or train/CLASS/* and test/CLASS/*; there is {found}")
    for split, folder in folders.items():
        if more := set(subfolders(folder)) - set(classes):
            raise InputError(f"folder:{path}: the {split} split has classes that train/ has not: "
                             f"{', '.join(sorted(more)[:5])}")
    return folders


def load_folder(path, size, root):
    """The splits of a folder, and notes for the records. See ``load``."""
    folders, files, split_of, y = split_folders(path), [], [], []
    for split, folder in folders.items():
        for k, class_name in enumerate(subfolders(next(iter(folders.values())))):
            home = folder / class_name
            found = image_folder.image_files(home) if home.is_dir() else []
            if not found and split in ("train", "all"):
                raise InputError(f"folder:{path}: class {class_name!r} has no image file")
            files += found
            split_of += [split] * len(found)
            y += [k] * len(found)
    image_folder.check_room(len(files), size)
    with distributed.first_goes_ahead():
        x, index, counts, line = decoded_once(path, files, size, root)
    if line:
        warn(f"folder:{path}: {line}")
    about = {"left_out": counts} if counts else {}
    split_of, y = np.array(split_of, dtype="U5")[index], torch.tensor(y)[index]
    if "all" in folders:
        order = image_folder.fixed_order(len(y))
        split_of[:] = "train"
        split_of[order[:len(y) // TEST_SHARE]] = "test"
        about["split"] = f"1 image in {TEST_SHARE} for testing, by seed {image_folder.ORDER_SEED}"
    rows = {split: torch.from_numpy(np.flatnonzero(split_of == split))
            for split in ("train", "valid", "test") if split in folders or split != "valid"}
    return {split: (x[r], y[r]) for split, r in rows.items()}, about


def decoded_once(path, files, size, root):
    """Decode ``files``, or read them from the cache under ``root`` if no file has changed.

    Returns (x uint8 [n, 3, size, size], the images' places in ``files``, {reason: number of files
    left out}, a line about those). The cache is one file, written atomically.
    """
    home = os.fsencode(os.path.abspath(path))
    stem = re.sub(r"[^\w.-]+", "_", path.resolve().name)
    cache = (Path(root) / "jempp-cache"
             / f"{stem}-{hashlib.sha256(home).hexdigest()[:12]}-{size}.npz")
    key = listing(path, files, size)
    if (found := read_cache(cache, key)) is not None:
        return found
    x, index, left_out = image_folder.decode(files, size)
    counts, line = image_folder.told(left_out, len(files))
    if image_folder.FOR_NOW in counts:
        return x, index, counts, line
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        words = json.dumps({"key": key, "left_out": counts, "line": line})
        with replacing(cache) as file:
            np.savez(file, words=np.array(words), index=np.array(index, np.int64), x=x.numpy())
    except OSError as error:
        warn(f"no cache in {cache.parent} ({error.strerror}): the pictures of {path} are decoded "
             "each time")
    return x, index, counts, line


def listing(path, files, size):
    """A digest of the names, sizes and times of ``files``, and of how images are made from them."""
    sha = hashlib.sha256(f"centre square, {size}\n".encode())
    for file in files:
        state = file.stat() if file.exists() else None
        words = f"{state.st_size} {state.st_mtime_ns}" if state else "absent"
        sha.update(os.fsencode(os.path.relpath(file, path)) + f"\0{words}\n".encode())
    return sha.hexdigest()


def read_cache(cache, key):
    """What ``decoded_once`` wrote for the files of this ``key``, or None."""
    if not cache.is_file():
        return None
    try:
        with np.load(cache, allow_pickle=False) as file:
            words = json.loads(str(file["words"]))
            if words["key"] != key:
                return None
            return (torch.from_numpy(file["x"]), file["index"].tolist(), words["left_out"],
                    words["line"])
    except (*BROKEN, TypeError):
        warn(f"{cache} is damaged: the pictures are decoded again")
        return None


# Arrays

def load_npz(path, size):
    """The splits of an .npz file. See ``load``."""
    shapes = headers(path)
    return {split: (squares(array(path, f"x_{split}"), size), labels(path, f"y_{split}"))
            for split in ("train", "valid", "test") if f"x_{split}" in shapes}


def headers(path):
    """{array: (shape, dtype)} of an .npz file.

    InputError if it is no data set or does not fit into memory.
    """
    if not path.is_file():
        raise InputError(f"npz:{path} is no file")
    readers = {(1, 0): np.lib.format.read_array_header_1_0,
               (2, 0): np.lib.format.read_array_header_2_0}
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in (f"{x}_{split}" for split in ("train", "valid", "test") for x in "xy"):
                if f"{name}.npy" in archive.namelist():
                    with archive.open(f"{name}.npy") as file:
                        shape, _, kind = readers[np.lib.format.read_magic(file)](file)
                        found[name] = shape, kind
    except BROKEN as error:
        raise InputError(f"npz:{path} cannot be read as a NumPy .npz file "
                         f"[{type(error).__name__}]") from error
    check_headers(path, found)
    return found


def check_headers(path, found):
    """InputError unless every split has as many labels as images, and all fit into memory."""
    need = ["x_train", "y_train", "x_test", "y_test"]
    need += ["x_valid", "y_valid"] if "x_valid" in found or "y_valid" in found else []
    if absent := [name for name in need if name not in found]:
        raise InputError(f"npz:{path} has no array {', '.join(absent)}")
    for x_name, y_name in zip(need[::2], need[1::2], strict=True):
        (x, x_kind), (y, y_kind) = found[x_name], found[y_name]
        grey = len(x) == 3
        layouts = [len(x) == 4 and x[axis] in (1, 3) for axis in (1, 3)]
        if x_kind != np.uint8 or not (grey or sum(layouts) == 1) or 0 in x:
            raise InputError(f"npz:{path}: {x_name} is {x_kind} {list(x)}: images are uint8 "
                             "[N, H, W, C], [N, C, H, W] or [N, H, W], C = 1 or 3")
        if y_kind.kind not in "iu" or math.prod(y) != x[0]:
            raise InputError(f"npz:{path}: {y_name} is {y_kind} {list(y)}: the labels of "
                             f"{x_name} are {x[0]} integers")
    size = sum(math.prod(shape) * kind.itemsize for shape, kind in found.values())
    if size > memory():
        raise InputError(f"npz:{path} holds {size / 1e9:,.1f} GB, more than the memory here")


def array(path, name):
    """One array of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file[name]
    except (*BROKEN, MemoryError) as error:
        raise InputError(f"npz:{path}: {name} cannot be read [{type(error).__name__}]") from error


def labels(path, name):
    """The labels int64 [N] of an .npz file."""
    headers(path)
    y = array(path, name).reshape(-1)
    if y.min() < 0 or y.max() >= MOST_CLASSES or name == "y_train" and y.max() < 1:
        raise InputError(f"npz:{path}: {name} holds labels {y.min()} .. {y.max()}: labels are "
                         "0 .. K-1 of two or more classes")
    return torch.from_numpy(y.astype(np.int64))


def squares(x, size):
    """The centre squares of uint8 images, resized, as RGB [N, 3, size, size].

    ``x`` has one of the layouts that ``check_headers`` accepts.
    """
    import torchvision.transforms.functional as TF  # here: it takes seconds

    x = torch.from_numpy(np.ascontiguousarray(x))
    x = x[:, None] if x.dim() == 3 else x if x.shape[1] in (1, 3) else x.permute(0, 3, 1, 2)
    x, rgb = TF.center_crop(x, min(x.shape[-2:])), image_folder.empty(len(x), size)
    for start in range(0, len(x), 4096):
        part = x[start:start + 4096]
        if part.shape[-1] != size:
            part = TF.resize(part, [size, size], antialias=True)
        rgb[start:start + 4096] = part
    return rgb
