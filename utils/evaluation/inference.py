"""Running a network over a data set."""

import copy

import torch
from torch.optim.swa_utils import update_bn

from samplers import to_pixels
from utils import distributed
from utils.machine import eager
from utils.program import InputError
from utils.seeding import generator


def pixels(x, start, stop, sigma=0.0, seed=0):
    """Images start to stop of ``x`` uint8 [N, 3, H, W] in [-1, 1], plus noise of std ``sigma``.

    Image i's noise depends on (seed, i) alone. The sum is not clamped.
    """
    part = to_pixels(x[start:stop])
    if sigma:
        noise = [torch.randn(part.shape[1:], generator=generator("cpu", seed, "noise", i))
                 for i in range(start, start + len(part))]
        part = part + sigma * torch.stack(noise).to(part.device)
    return part


@torch.no_grad()
def predict(model, x, batch_size=None, sigma=0.0, seed=0):
    """Logits [N, K] of uint8 images ``x`` [N, 3, H, W]. Runs in eval mode and restores the mode.

    ``batch_size``: by default as many pixels as 500 images of 32 x 32 have, or 500 smaller ones.
    ``sigma`` and ``seed`` determine the noise, as in ``pixels``.
    """
    batch_size = batch_size or max(1, min(500, 500 * 32**2 // (x.shape[2] * x.shape[3])))

    def logits(start):
        return model(pixels(x, start, start + batch_size, sigma, seed)).cpu()

    training = model.training
    model.eval()
    with eager():
        outputs = distributed.spread(logits, range(0, len(x), batch_size), "images")
    model.train(training)
    return torch.cat(outputs).to(x.device)


def recalibrated(model, x, size, layout=torch.contiguous_format):
    """A copy of ``model`` whose running statistics are the means over batches of ``x``.

    ``x`` are uint8 images [N, 3, H, W]. The batches have up to ``size`` images and are as equal as
    can be, because the statistics of each count the same.
    """
    model, batches = copy.deepcopy(model), x.tensor_split(-(-len(x) // size))
    try:
        with eager():
            update_bn((to_pixels(b).contiguous(memory_format=layout) for b in batches), model)
    except ValueError as error:  # batch norm without an image's rows and columns, over one image
        raise InputError(f"--recalibrate_bn {len(x)}: {error}") from error
    return model


def accuracy(model, images):
    """The fraction of an ``Images`` split that is classified correctly. None for an empty split."""
    if not len(images.y):
        return None
    correct = predict(model, images.x).argmax(1) == images.y
    return int(correct.sum()) / len(images.y)
