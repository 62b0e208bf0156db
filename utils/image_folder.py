"""Folders of pictures as uint8 images: what counts as one, how it is read and made square."""

import contextlib
import functools
import itertools
import math
import os
import sys
import warnings
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from utils import distributed
from utils.program import InputError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # EPS would start Ghostscript
# A file of such a name that cannot be read is counted; others are looked into, to see what they are
SUFFIXES = {".avif", ".bmp", ".gif", ".heic", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm",
            ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
LITTER = {"__MACOSX"}  # what unpacking leaves beside the pictures; names with a dot in front, too
THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes without holding Python's lock
AT_ONCE = 256  # files handed to the threads together
MOST_BYTES = 2**30  # of a picture's file
DARKEST = 4096  # 16-bit pixels that all lie below were never meant to reach 65535


class Decoded(NamedTuple):
    """What came of a list of files: ``x`` uint8 [n, 3, S, S], where each image stood in the list,
    and {reason: [file, ...]} of those that could not be read."""

    x: torch.Tensor
    index: list
    left_out: dict


def visible(entry):
    """Whether a folder's entry is the user's own, and not some system's litter."""
    return not entry.name.startswith(".") and entry.name not in LITTER


def subfolders(path):
    """The names of the visible folders in ``path``, sorted as torchvision sorts classes."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and visible(e))


def image_files(path):
    """The image files below a folder, sorted; links are followed, but each folder is entered once
    and none that holds ``path`` itself."""
    path = Path(os.path.abspath(path))
    files, todo, entered = [], deque([path]), {p.resolve() for p in path.parents}
    entered |= set(path.resolve().parents)
    while todo:
        folder = todo.popleft()
        if (real := folder.resolve()) in entered:
            continue
        entered.add(real)
        with os.scandir(folder) as entries:
            for entry in sorted(filter(visible, entries), key=lambda e: e.name):
                file = folder / entry.name
                if not entry.is_dir():
                    files += [file] if is_image(file) else []
                elif entry.is_symlink():
                    todo.append(file)  # last: what can be reached without a link is
                else:
                    todo.appendleft(file)
    return sorted(files)


def is_image(path):
    """Whether a file passes for an image: by its suffix, or else by what it begins with."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with warnings.catch_warnings(action="ignore"), opened(path):
            return True
    except Exception:  # whatever a decoder makes of a file that is none
        return False


def opened(path):
    """A regular file as a Pillow image, its pixels not read yet."""
    if not path.is_file():  # a pipe or a device would be waited for
        raise ValueError("no regular file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES:,} bytes")
    return Image.open(path, formats=FORMATS)


def decode(files, size, *, side=None, limit=None):
    """Read ``files`` in parallel, until ``limit`` images are there, as ``Decoded``. What a square
    of an image is: see ``square``."""
    n = len(files) if limit is None else min(limit, len(files))
    x, index, left_out = empty(n, size), [], defaultdict(list)
    todo = iter(range(len(files)))
    bar = tqdm(total=n, desc="decoding", leave=False, disable=distributed.rank() > 0 or None)

    def work(i):
        try:
            return square(read_rgb(files[i]), size, side)
        except Exception as error:  # on damaged bytes decoders raise nearly anything
            return reason(error)

    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(THREADS) as pool, bar:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        while part := list(itertools.islice(todo, min(AT_ONCE, n - len(index)))):
            for i, result in zip(part, pool.map(work, part), strict=True):
                if isinstance(result, str):
                    left_out[result].append(files[i])
                else:
                    x[len(index)] = result
                    index.append(i)
            bar.update(len(part))
    return Decoded(x[:len(index)], index, dict(left_out))


def empty(n, size):
    """Memory for ``n`` images uint8 [n, 3, size, size]; InputError where there is not enough."""
    check_room(n, size)
    return torch.empty(n, 3, size, size, dtype=torch.uint8)


def check_room(n, size):
    """InputError for more images than memory."""
    need, there = 3 * n * size**2, memory()
    if 2 * need > there:  # the splits are copies
        raise InputError(f"{n:,} images of {size} x {size} take 2 x {need / 1e9:,.1f} GB, the "
                         f"memory here has {there / 1e9:,.1f} GB: a smaller --image_size, or fewer "
                         "images")


def memory():
    """Bytes of memory that are free, as far as the system tells (else infinite)."""
    free = [math.inf]
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # a container's limit
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min(free)


def reason(error):
    """Why an image was left out, in words that many files can share."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known format"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, ValueError) and "\n" not in str(error) and len(str(error)) < 60:
        return str(error)
    return "damaged or unreadable"


def told(left_out, n_files):
    """{reason: how many} of what was left out of ``n_files``, and one line about it ("" if none):
    each reason with the first of its files."""
    counts = {why: len(files) for why, files in left_out.items()}
    parts = [f"{len(files)} {why} ({files[0]}{', ...' if len(files) > 1 else ''})"
             for why, files in left_out.items()]
    line = f"{sum(counts.values())} of {n_files} image files left out: {'; '.join(parts)}"
    return counts, line if counts else ""


def read(path, size, n=None):
    """The first ``n`` readable images below ``path`` (uint8 [m, 3, size, size], m <= n), and
    {reason: how many} of those left out on the way, which are also told on stderr."""
    if not path.is_dir():
        raise InputError(f"folder:{path} is no folder")
    x, index, left_out = decode(image_files(path), size, limit=n)
    counts, line = told(left_out, len(index) + sum(map(len, left_out.values())))
    if line:
        warn(f"folder:{path}: {line}")
    if not index:
        raise InputError(f"folder:{path} holds no readable image ({', '.join(sorted(SUFFIXES))})")
    return x, counts


@functools.cache
def warn(line):
    """A line on stderr, once, of the first process."""
    if distributed.rank() == 0:
        print(line, file=sys.stderr)


def read_rgb(path):
    """An image file of any mode as an RGB image: the first frame, turned as its EXIF data say,
    without its transparency. ValueError where what its pixels mean cannot be known."""
    with opened(path) as image:
        if image.mode == "F":
            raise ValueError("floating-point pixels of unknown range")
        if image.mode.startswith("I"):
            grey = Image.fromarray(grey_of_16_bits(image))
            grey.info["exif"] = image.info.get("exif", b"")
            return upright(grey).convert("RGB")
        if "transparency" in image.info and image.mode == "P":
            return upright(image.convert("RGBA")).convert("RGB")
        return upright(image).convert("RGB")


def upright(image):
    """``image`` turned as its EXIF data say; where those are damaged, as it lies."""
    image.load()  # pixels that are damaged, on the other hand, are an error
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever Pillow makes of damaged EXIF data
        return image


def grey_of_16_bits(image):
    """The pixels uint8 [h, w] of a 16-bit grey image, which convert() would clip at 255."""
    if image.mode == "I" and image.format != "PPM":  # Pillow brings a PGM's to 0..65535
        raise ValueError("32-bit or signed pixels of unknown range")
    grey, tags = np.asarray(image), getattr(image, "tag_v2", {})
    top = 4095 if tags.get(258) == (12,) else 65535  # BitsPerSample
    if 0 < grey.max() < DARKEST and top == 65535:
        raise ValueError(f"16-bit pixels that all lie below {DARKEST}")
    grey = (grey / (top / 255)).round().astype(np.uint8)
    return 255 - grey if tags.get(262) == 0 else grey  # WhiteIsZero


def square(image, size, side=None):
    """The centre ``side`` x ``side`` (at most, and without it, the shorter side) of an RGB image,
    resized to uint8 [3, size, size]; Pillow's bilinear filter antialiases."""
    image = TF.center_crop(image, min(side or math.inf, *image.size))
    return TF.pil_to_tensor(TF.resize(image, [size, size]))
