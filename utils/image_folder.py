"""Reading folders of pictures: which files count, decoding, and cropping to a square."""

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
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from utils import distributed
from utils.program import InputError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # EPS would start Ghostscript
# A file with such a suffix counts as an image even if it is unreadable. Others are opened to check.
SUFFIXES = {".avif", ".bmp", ".gif", ".heic", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm",
            ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
LITTER = {"__MACOSX"}  # left by unpacking; names that begin with a dot are skipped too
THREADS = min(8, os.cpu_count() or 1)  # Pillow releases Python's lock while it decodes
AT_ONCE = 256  # files given to the threads at once
MOST_BYTES = 2**30  # in a picture's file
ORDER_SEED = 1234  # of ``fixed_order``
FOR_NOW = "that could not be opened now"  # a reason that says nothing of the file
DARKEST = 4096  # if all 16-bit pixels are below this, their range is not 0..65535


class Decoded(NamedTuple):
    """The images of a list of files.

    ``x`` is uint8 [n, 3, S, S], ``index`` holds each image's place in the list, and ``left_out``
    is {reason: [file, ...]} for files that could not be read.
    """

    x: torch.Tensor
    index: list
    left_out: dict


def visible(entry):
    """Whether a folder's entry is the user's, not a hidden or system file."""
    return not entry.name.startswith(".") and entry.name not in LITTER


def subfolders(path):
    """The names of the visible folders in ``path``, sorted as torchvision sorts classes."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and visible(e))


def image_files(path):
    """The image files below a folder, sorted.

    Links are followed, but each folder is entered only once, and folders that contain ``path``
    never.
    """
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
                    todo.append(file)  # last, so that real paths come before links
                else:
                    todo.appendleft(file)
    return sorted(files)


def is_image(path):
    """Whether a file is an image, judged by its suffix, or else by its first bytes."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with warnings.catch_warnings(action="ignore"), opened(path):
            return True
    except Exception:  # decoders raise many types on other files
        return False


def opened(path):
    """Open a regular file as a Pillow image, without reading its pixels."""
    if not path.is_file():  # opening a pipe or a device could block
        raise ValueError("no regular file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES:,} bytes")
    return Image.open(path, formats=FORMATS)


def decode(files, size, *, side=None, limit=None):
    """Read ``files`` in parallel until ``limit`` images are read. Return ``Decoded``.

    Images are cropped and resized as in ``square``.
    """
    n = len(files) if limit is None else min(limit, len(files))
    x, index, left_out = empty(n, size), [], defaultdict(list)
    todo = iter(range(len(files)))
    bar = tqdm(total=n, desc="decoding", leave=False, disable=distributed.rank() > 0 or None)

    def work(i):
        try:
            return square(read_rgb(files[i]), size, side)
        except Exception as error:  # decoders raise many types on damaged bytes
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
    """Allocate ``n`` images uint8 [n, 3, size, size]. InputError if memory is too small."""
    check_room(n, size)
    return torch.empty(n, 3, size, size, dtype=torch.uint8)


def check_room(n, size):
    """InputError if ``n`` images do not fit into memory."""
    need, there = 3 * n * size**2, memory()
    if 2 * need > there:  # the splits are copies
        raise InputError(f"{n:,} images of {size} x {size} take 2 x {need / 1e9:,.1f} GB, the "
                         f"memory here has {there / 1e9:,.1f} GB: a smaller --image_size, or fewer "
                         "images")


def memory():
    """The free memory in bytes, or infinity if the system does not tell."""
    free = [math.inf]
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # a container's limit
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min(free)


def reason(error):
    """Why an image was left out, in words that do not depend on the file."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known format"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno:
        return FOR_NOW  # Pillow's own errors have no number
    if isinstance(error, ValueError) and "\n" not in str(error) and len(str(error)) < 60:
        return str(error)
    return "damaged or unreadable"


def told(left_out, n_files):
    """({reason: number of files left out}, one line that says so, or "" if none were).

    The line names the first file of each reason.
    """
    counts = {why: len(files) for why, files in left_out.items()}
    parts = [f"{len(files)} {why} ({files[0]}{', ...' if len(files) > 1 else ''})"
             for why, files in left_out.items()]
    line = f"{sum(counts.values())} of {n_files} image files left out: {'; '.join(parts)}"
    return counts, line if counts else ""


def read(path, size, n=None):
    """``n`` readable images below ``path``, or all (uint8 [m, 3, size, size], m <= n), and
    {reason: how many} of those left out on the way, which are also told on stderr.

    They come in an order that only their number decides, because the first n of a sorted list
    would be those of one folder inside.
    """
    if not path.is_dir():
        raise InputError(f"folder:{path} is no folder")
    files = image_files(path)
    x, index, left_out = decode([files[i] for i in fixed_order(len(files))], size, limit=n)
    counts, line = told(left_out, len(index) + sum(map(len, left_out.values())))
    if line:
        warn(f"folder:{path}: {line}")
    if not index:
        raise InputError(f"folder:{path} holds no readable image ({', '.join(sorted(SUFFIXES))})")
    return x, counts


def fixed_order(n):
    """The numbers 0 .. n-1 in a shuffled order that depends on ``n`` alone."""
    return np.random.RandomState(ORDER_SEED).permutation(n)


@functools.cache
def warn(line):
    """Print a line on stderr, only once and only on rank 0."""
    if distributed.rank() == 0:
        print(line, file=sys.stderr)


def read_rgb(path):
    """Read the first frame of an image file as RGB, turned by its EXIF data, without transparency.

    ValueError if the range of its pixels is unknown.
    """
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
    """Turn ``image`` by its EXIF data, or leave it as it is if they are damaged."""
    image.load()  # damaged pixels are an error
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises many types on damaged EXIF data
        return image


def grey_of_16_bits(image):
    """The pixels uint8 [h, w] of a 16-bit grey image. Pillow's convert() would clip them at 255."""
    if image.mode == "I" and image.format != "PPM":  # Pillow scales a PGM's pixels to 0..65535
        raise ValueError("32-bit or signed pixels of unknown range")
    grey, tags = np.asarray(image), getattr(image, "tag_v2", {})
    top = 4095 if tags.get(258) == (12,) else 65535  # BitsPerSample
    if 0 < grey.max() < DARKEST and top == 65535:
        raise ValueError(f"16-bit pixels that all lie below {DARKEST}")
    grey = (grey / (top / 255)).round().astype(np.uint8)
    return 255 - grey if tags.get(262) == 0 else grey  # WhiteIsZero


def square(image, size, side=None):
    """Crop the centre square of an RGB image and resize it to uint8 [3, size, size].

    The square's side is ``side``, or the image's shorter side if that is smaller or ``side`` is
    None. Pillow's bilinear filter antialiases.
    """
    import torchvision.transforms.functional as TF  # here: it takes seconds

    image = TF.center_crop(image, min(side or math.inf, *image.size))
    return TF.pil_to_tensor(TF.resize(image, [size, size]))
