"""Out-of-distribution detection: metrics, scores, and out-of-distribution sets.

A *score* is higher for in-distribution images: log p(x) = -E(x) up to log Z, max_y p(y|x), or
-||grad_x log p(x)||. In-distribution is the positive class of every metric.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from models import energy, frozen
from utils import data, distributed, image_folder, own_images
from utils.evaluation.inference import pixels
from utils.machine import eager
from utils.program import InputError, Unavailable
from utils.seeding import generator

LOADED = tuple(data.SPECS)
GENERATED = ("interp", "uniform", "constant")
NAMES = (*LOADED, "celeba", *GENERATED, "folder:PATH", "npz:FILE")
CELEBA_TEST = 19_962  # images of its test split
CELEBA_CROP = 140  # pixels of the aligned 178 x 218 images, which removes most background


def auroc(score_in, score_out):
    """Area under the ROC curve, in [0, 1]: P(in > out) + P(in = out) / 2 for scores [N], [M]."""
    from sklearn.metrics import roc_auc_score  # here: it takes seconds

    return float(roc_auc_score(*labelled(score_in, score_out)))


def aupr(score_in, score_out):
    """Average precision, in [0, 1], with in-distribution positive. Chance is N / (N + M)."""
    from sklearn.metrics import average_precision_score  # here: it takes seconds

    return float(average_precision_score(*labelled(score_in, score_out)))


def fpr_at_95_tpr(score_in, score_out):
    """Fraction of out images accepted at the highest threshold that accepts >= 95 % of the in ones.

    An image is accepted if score >= threshold. So ties with the threshold count as accepted, for in
    and out images alike. Nothing is interpolated.
    """
    score_in, score_out = scores(score_in, "score_in"), scores(score_out, "score_out")
    n_accepted = -(-95 * len(score_in) // 100)  # the ceiling, exact because it is in integers
    threshold = np.sort(score_in)[-n_accepted]
    return float((score_out >= threshold).mean())


def labelled(score_in, score_out):
    """(labels, scores) of both sets together, 1 = in-distribution."""
    score_in, score_out = scores(score_in, "score_in"), scores(score_out, "score_out")
    return [1] * len(score_in) + [0] * len(score_out), np.concatenate([score_in, score_out])


def scores(values, name):
    """A tensor or array [N] as float64. ValueError unless it is finite and not empty."""
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
    """max_y p(y|x) in [1/K, 1]: logits [N, K] to float64 [N] (in float32 many would tie at 1)."""
    return logits.double().softmax(1).amax(1)


def logits_and_gradient_norm(model, x_uint8, batch_size=500, sigma=0.0, seed=0):
    """Logits [N, K] and the score -||grad_x log p(x)||_2, float64 [N], both on the CPU.

    Images are uint8 [N, 3, H, W]. The gradient is with respect to pixels in [-1, 1]. ``sigma`` and
    ``seed`` are those of ``inference.pixels``. One forward and one backward pass run in eval mode,
    so that an image's score does not depend on its batch. The mode is restored.
    """
    if x_uint8.dtype != torch.uint8:
        raise ValueError(f"images are uint8 here, got {x_uint8.dtype}")

    def passes(start):
        x = pixels(x_uint8, start, start + batch_size, sigma, seed).requires_grad_()
        logits = model(x)
        (gradient,) = torch.autograd.grad(energy(logits).sum(), x)  # E = -log p(x)
        norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
        return logits.detach().cpu(), norm.cpu()

    training = model.training
    model.eval()
    try:
        with frozen(model), eager(), torch.enable_grad():
            parts = distributed.spread(passes, range(0, len(x_uint8), batch_size), "gradients")
    finally:
        model.train(training)
    logits, norms = (torch.cat(column) for column in zip(*parts, strict=True))
    return logits, -norms


class OutSet(NamedTuple):
    """Out-of-distribution images, uint8 [N, 3, size, size] on the CPU, and notes on their origin.

    The notes go into the records.
    """

    x: torch.Tensor
    about: dict


def name_and_source(text):
    """An out set's name and its source. ``svhn=folder:PATH`` is called svhn."""
    name, equals, source = text.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", name) and own_images.is_own(source):
        return name, source
    return text, text


def check_names(texts):
    """InputError if an out set does not exist, has no image files, or shares its name with another.

    Files and panels are named after out sets. Call this before measuring anything.
    """
    named = [name_and_source(text) for text in texts]
    short = [Path(name).name if own_images.is_own(name) else name for name, _ in named]
    if len(set(short)) < len(short):
        raise InputError("two of the --ood sets have the same name")
    for _, source in named:
        if source.startswith("folder:"):
            path = own_images.path_of(source)
            if not path.is_dir():
                raise InputError(f"{source} is no folder")
            if not image_folder.image_files(path):
                raise InputError(f"{source} holds no image file "
                                 f"({', '.join(sorted(image_folder.SUFFIXES))})")
        elif source.startswith("npz:"):
            own_images.headers(own_images.path_of(source))
        elif source not in NAMES:
            raise InputError(f"unknown out-of-distribution set {source!r}: choose from "
                             f"{', '.join(NAMES)}")


def out_set(text, size, *, in_x, root, seed, download=False, n=None):
    """The out-of-distribution set ``text`` as an ``OutSet``.

    cifar10, svhn, ...  the test split, resized (bilinear, antialiased) if need be
    celeba       test split of the aligned images: centre crop of 140 x 140, antialiased resize
    interp       mean of two random different images of ``in_x``, halves rounded up
    uniform      every value uniform in 0..255
    constant     one uniformly random colour an image
    folder:PATH  the image files below PATH; centre square, antialiased resize
    npz:FILE     its test split, likewise
    NAME=folder:PATH or NAME=npz:FILE  the same under another name

    Only the first ``n`` images are read. Without ``n``, generated sets have as many images as
    ``in_x`` (uint8 [N, 3, H, W]). Generated image i depends on (seed, i) alone. A one-line
    InputError for an unknown name or missing files.
    """
    if n is not None and n < 1:
        raise InputError(f"{n} out-of-distribution images: ask for 1 or more")
    name, source = name_and_source(text)
    about = {} if name == source else {"origin": source}
    if source in LOADED or source.startswith("npz:"):
        images = data.load(source, root, train=False, download=download,
                           size=nearest_size(source, size))
        x, about = images.x[:n], about | images.about
    elif source == "celeba":
        x, about = celeba(root, size, n), about | {"crop": CELEBA_CROP}
    elif source in GENERATED:
        x = generated(source, size, len(in_x) if n is None else n, in_x.cpu(), seed)
    elif source.startswith("folder:") and source != "folder:":
        x, left_out = image_folder.read(own_images.path_of(source), size, n)
        about |= {"left_out": left_out} if left_out else {}
    else:
        raise InputError(f"unknown out-of-distribution set {text!r}: choose from "
                         f"{', '.join(NAMES)}")
    if x.shape[-2:] != (size, size):
        import torchvision.transforms.functional as TF  # here: it takes seconds

        x = TF.resize(x, [size, size], antialias=True)  # bilinear by default, as below
    return OutSet(x, about)


def nearest_size(source, size):
    """The side at which to read a data set for images of side ``size``.

    That is ``size`` itself if the data set has it, or else the next larger, or its largest.
    """
    if own_images.is_own(source):
        return size
    sides = sorted({data.SPECS[source].size, *data.SPECS[source].sizes})
    return next((side for side in sides if side >= size), sides[-1])


def generated(name, size, n, in_x, seed):
    """``n`` images of interp, uniform or constant. Each has its own random stream."""
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
    """The first ``n`` CelebA test images. Unavailable if any file is missing or damaged.

    They are never downloaded, because of quotas. The files may be laid out as by CelebA's authors
    or as on Kaggle.
    """
    home = Path(os.path.abspath(root), "celeba")
    pictures, nested = home / "img_align_celeba", home / "img_align_celeba" / "img_align_celeba"
    try:
        names = celeba_test_names(home)[:n]
    except (OSError, ValueError) as error:
        raise no_celeba(home, error) from error
    if not pictures.is_dir():
        raise no_celeba(home, f"missing: {pictures.name}/")
    files = [(nested if nested.is_dir() else pictures) / name for name in names]
    x, _, left_out = image_folder.decode(files, size, side=CELEBA_CROP)
    for why, (file, *_) in left_out.items():  # the paper's numbers use all images
        raise no_celeba(home, f"{file.name} is {why if file.exists() else 'missing'}")
    return x


def celeba_test_names(home):
    """The test images' file names, in the order of the partition list (a .csv has a header)."""
    lists = [home / f"list_eval_partition.{kind}" for kind in ("txt", "csv")]
    found = next((file for file in lists if file.is_file()), None)
    if found is None:
        raise ValueError(f"missing: {lists[0].name}")
    rows = [line.replace(",", " ").split() for line in found.read_text("utf-8").splitlines()]
    names = [row[0] for row in rows if len(row) == 2 and row[1] == "2"]
    if len(names) != CELEBA_TEST:
        raise ValueError(f"{found.name} names {len(names):,} of {CELEBA_TEST:,} test images")
    return names


def no_celeba(home, why):
    """The error that tells where to put CelebA's files."""
    return Unavailable(f"celeba is not complete under {home} and is never downloaded: put the "
                       "unpacked folder img_align_celeba/ and list_eval_partition.txt (or Kaggle's "
                       f".csv) there, in the folder celeba/ of --data_root [{why}]")
