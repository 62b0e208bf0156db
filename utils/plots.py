"""Pictures. Figures are small PNGs; images in [-1, 1] become uint8 in one place."""

import torch
from PIL import Image
from torchvision.utils import make_grid

from utils.records import replacing


def to_uint8(x):
    """Images in [-1, 1] (clamped there) to uint8, rounded: the one conversion on the way out."""
    return x.detach().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def grid(x, columns=10, side=640):
    """Images [n, 3, H, W] in [-1, 1] as one uint8 picture [3, h, w], each magnified by a whole
    number so that the picture is about ``side`` pixels wide."""
    factor = max(1, round(side / (columns * x.shape[-1])))
    x = to_uint8(x).cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return make_grid(x, nrow=columns, padding=2, pad_value=255)


def save_image(path, picture):
    """Write a uint8 picture [3, h, w] as PNG."""
    with replacing(path) as file:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, format="PNG")
