"""Folders of pictures as uint8 images: what counts as one, how it is read and made square."""

import math
import sys
import warnings

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from utils.program import InputError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # EPS would start Ghostscript
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def image_files(path):
    """The image files below a folder, by suffix, sorted."""
    return sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())


def read(path, size, n):
    """The first ``n`` readable images below ``path``; the others are counted on stderr."""
    if not path.is_dir():
        raise InputError(f"folder:{path} is no folder")
    images, skipped = [], []
    for file in image_files(path):
        if len(images) == n:
            break
        try:
            images.append(square(read_rgb(file), size))
        except Exception as error:  # on damaged bytes decoders raise nearly anything
            skipped.append(f"{file}: {' '.join(str(error).split())[:120]}")
    if skipped:
        print(f"folder:{path}: skipped {len(skipped)} broken or oversized image files, the first "
              f"is {skipped[0]}", file=sys.stderr)
    if not images:
        raise InputError(f"folder:{path} holds no readable image ({', '.join(sorted(SUFFIXES))})")
    return torch.stack(images)


def read_rgb(path):
    """An image file of any mode as an RGB image (transparency dropped, first frame)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            if image.mode == "F":
                raise ValueError("floating-point pixels of unknown range")
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
                grey = np.clip(np.asarray(image) / 257, 0, 255).round().astype(np.uint8)
                return Image.fromarray(grey).convert("RGB")
            return image.convert("RGB")


def square(image, size, side=None):
    """The centre ``side`` x ``side`` (at most, and without it, the shorter side) of an RGB image,
    resized to uint8 [3, size, size]; Pillow's bilinear filter antialiases."""
    image = TF.center_crop(image, min(side or math.inf, *image.size))
    return TF.pil_to_tensor(TF.resize(image, [size, size]))
