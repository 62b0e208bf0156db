"""Running a network over a data set."""

import torch

from samplers import to_pixels
from utils import distributed
from utils.machine import eager
from utils.seeding import generator


@torch.no_grad()
def predict(model, x, batch_size=500, sigma=0.0, seed=0):
    """Logits [N, K] of uint8 images ``x`` [N, 3, H, W], in eval mode; the mode is put back.

    ``sigma``: std of noise added to the [-1, 1] images; image i's depends on (seed, i) alone.
    """
    def logits(start):
        part = to_pixels(x[start:start + batch_size])
        if sigma:
            noise = [torch.randn(part.shape[1:], generator=generator("cpu", seed, "noise", i))
                     for i in range(start, start + len(part))]
            part = part + sigma * torch.stack(noise).to(part.device)
        return model(part).cpu()

    training = model.training
    model.eval()
    with eager():
        outputs = distributed.spread(logits, range(0, len(x), batch_size), "images")
    model.train(training)
    return torch.cat(outputs).to(x.device)


def accuracy(model, images):
    """Fraction of an ``Images`` split that the model classifies right; None for an empty split."""
    if not len(images.y):
        return None
    correct = predict(model, images.x).argmax(1) == images.y
    return int(correct.sum()) / len(images.y)
