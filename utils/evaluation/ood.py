"""Out-of-distribution detection: metrics, scores, and the sets that the scores are compared on.

A *score* is higher for in-distribution images: log p(x) = -E(x) up to log Z, max_y p(y|x), or
-||grad_x log p(x)||. In-distribution is the positive class of every metric.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from sklearn.metrics import average_precision_score, roc_auc_score
from torchvision.datasets import CelebA

from models import energy
from samplers import to_pixels
from utils import data, distributed, image_folder
from utils.program import InputError, Unavailable
from utils.seeding import generator

LOADED = ("svhn", "cifar10", "cifar100", "digits")
GENERATED = ("interp", "uniform", "constant")
NAMES = (*LOADED, "celeba", *GENERATED, "folder:PATH")
CELEBA_CROP = 140  # pixels of the aligned 178 x 218 images: the face without most background


def auroc(score_in, score_out):
    """Area under the ROC curve, in [0, 1]: P(in > out) + P(in = out) / 2 for scores [N], [M]."""
    return float(roc_auc_score(*labelled(score_in, score_out)))


def aupr(score_in, score_out):
    """Average precision, in [0, 1], in-distribution positive; at chance it is N / (N + M)."""
    return float(average_precision_score(*labelled(score_in, score_out)))


def fpr_at_95_tpr(score_in, score_out):
    """Fraction of out images accepted at the highest threshold that accepts >= 95 % of the in ones.

    Accepted is score >= threshold, so that scores tied with the threshold count as accepted, on
    both sides; nothing is interpolated.
    """
    score_in, score_out = scores(score_in, "score_in"), scores(score_out, "score_out")
    n_accepted = -(-95 * len(score_in) // 100)  # the ceiling, in integers: 0.95 is no exact float
    threshold = np.sort(score_in)[-n_accepted]
    return float((score_out >= threshold).mean())


def labelled(score_in, score_out):
    """(labels, scores) of both sets together, 1 = in-distribution."""
    score_in, score_out = scores(score_in, "score_in"), scores(score_out, "score_out")
    return [1] * len(score_in) + [0] * len(score_out), np.concatenate([score_in, score_out])


def scores(values, name):
    """A tensor or array [N] as float64; ValueError unless it is finite and not empty."""
    values = values.detach().cpu().double() if torch.is_tensor(values) else values
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} holds one score an image, [N] with N > 0; got {values.shape}")
    if n_bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"{name} holds {n_bad} NaN or infinite of {len(values)} scores")
    return values


def log_p_x(logits):
    """log p(x) + log Z = -E(x) = LogSumExp_y f(x)[y] (Eq. 4): logits [N, K] to float64 [N]."""
    return -energy(logits.double())


def max_p_y_given_x(logits):
    """max_y p(y|x) in [1/K, 1]: logits [N, K] to float64 [N] (float32 would tie many at 1)."""
    return logits.double().softmax(1).amax(1)


def gradient_norm_score(model, x_uint8, batch_size=500):
    """-||grad_x log p(x)||_2 of images uint8 [N, 3, H, W], float64 [N] on x's device.

    The gradient is with respect to pixels in [-1, 1]. Runs in eval mode, so that an image's score
    does not depend on its batch; the mode is put back.
    """
    if x_uint8.dtype != torch.uint8:
        raise ValueError(f"images are uint8 here, got {x_uint8.dtype}")
    def norms(part):
        gradient = model.energy_gradient(to_pixels(part)).flatten(1)  # E = -log p(x)
        return torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64).cpu()

    training = model.training
    model.eval()
    try:
        parts = distributed.spread(norms, x_uint8.split(batch_size), "gradients")
    finally:
        model.train(training)
    return -torch.cat(parts).to(x_uint8.device)


def check_names(names):
    """InputError, before anything is measured, for an out set that does not exist, a folder without
    image files, or two folders of one name (files and panels are called after it)."""
    folders = [Path(name).name for name in names if name.startswith("folder:")]
    if len(set(folders)) < len(folders) or len(set(names)) < len(names):
        raise InputError("two of the --ood sets have the same name")
    for name in names:
        if name.startswith("folder:"):
            path = Path(name.removeprefix("folder:")).expanduser()
            if not path.is_dir():
                raise InputError(f"{name} is no folder")
            if not image_folder.image_files(path):
                raise InputError(f"{name} holds no image file "
                                 f"({', '.join(sorted(image_folder.SUFFIXES))})")
        elif name not in NAMES:
            raise InputError(f"unknown out-of-distribution set {name!r}: choose from "
                             f"{', '.join(NAMES)}")


def out_images(name, size, *, in_x, root, seed, download=False, n=None):
    """The out-of-distribution set ``name`` as uint8 [N, 3, size, size] on the CPU.

    svhn, cifar10, cifar100, digits  the test split, resized (bilinear, antialiased) if need be
    celeba       test split of the aligned images: centre crop of 140 x 140, antialiased resize
    interp       mean of two random different images of ``in_x``, halves rounded up
    uniform      every value uniform in 0..255
    constant     one uniformly random colour an image
    folder:PATH  the image files below PATH, sorted; centre square, antialiased resize

    ``n`` limits the set to its first images. Without it, generated sets have as many as ``in_x``
    (uint8 [N, 3, H, W]). Generated image i depends on (seed, i) alone. InputError, in one line,
    for an unknown name, missing files, or fewer images than ``n``.
    """
    if n is not None and n < 1:
        raise InputError(f"{n} out-of-distribution images are none: ask for 1 or more")
    if name in LOADED:
        own = {"size": size} if name == "digits" else {}
        x = data.load(name, root, train=False, download=download, **own).x[:n]
    elif name == "celeba":
        x = celeba(root, size, n)
    elif name in GENERATED:
        x = generated(name, size, len(in_x) if n is None else n, in_x.cpu(), seed)
    elif name.startswith("folder:") and name != "folder:":
        x = image_folder.read(Path(name.removeprefix("folder:")).expanduser(), size, n)
    else:
        raise InputError(f"unknown out-of-distribution set {name!r}: choose from "
                         f"{', '.join(NAMES)}")
    if n is not None and len(x) < n:
        raise InputError(f"{name} has {len(x)} images, {n} were asked for")
    if x.shape[-2:] != (size, size):
        x = TF.resize(x, [size, size], antialias=True)  # bilinear by default, as below
    return x


def generated(name, size, n, in_x, seed):
    """``n`` images of interp, uniform or constant, each from its own random stream."""
    if name == "interp" and len(in_x) < 2:
        raise InputError(f"interp needs 2 or more test images to mix, got {len(in_x)}")
    images = []
    for i in range(n):
        stream = generator("cpu", seed, "ood", name, i)
        if name == "interp":
            first = int(torch.randint(len(in_x), (), generator=stream))
            other = first + int(torch.randint(1, len(in_x), (), generator=stream))
            pair = in_x[first].int() + in_x[other % len(in_x)].int()
            images.append(((pair + 1) // 2).to(torch.uint8))
        else:
            side = 1 if name == "constant" else size
            x = torch.randint(256, (3, side, side), generator=stream, dtype=torch.uint8)
            images.append(x.expand(3, size, size))
    return torch.stack(images)


def celeba(root, size, n):
    """The first ``n`` CelebA test images; never downloaded (quotas), so the files must be there."""
    home = Path(os.path.abspath(root), CelebA.base_folder)
    lists = [file for _, _, file in CelebA.file_list if file.endswith(".txt")]
    try:
        dataset = CelebA(str(root), split="test", target_type=[], download=False)
        return torch.stack([image_folder.square(dataset[i][0].convert("RGB"), size, CELEBA_CROP)
                            for i in range(len(dataset))[:n]])
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        absent = [file for file in ("img_align_celeba", *lists) if not (home / file).exists()]
        state = f"missing: {', '.join(absent)}" if absent else "a file is damaged or missing"
        raise Unavailable(f"celeba is not (whole) under {home} and is never downloaded: put the "
                         f"unpacked folder img_align_celeba/ and {', '.join(lists)} there, in the "
                         f"folder celeba/ of --data_root [{state}]") from error
