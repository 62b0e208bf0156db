"""Running a network over a data set."""

import torch

from samplers import to_pixels


@torch.no_grad()
def predict(model, x, batch_size=500):
    """Logits [N, K] of uint8 images ``x`` [N, 3, H, W], in eval mode; the mode is put back."""
    training = model.training
    model.eval()
    logits = torch.cat([model(to_pixels(part)) for part in x.split(batch_size)])
    model.train(training)
    return logits


def accuracy(model, images):
    """Fraction of an ``Images`` split that the model classifies right; None for an empty split."""
    if not len(images.y):
        return None
    correct = predict(model, images.x).argmax(1) == images.y
    return int(correct.sum()) / len(images.y)
