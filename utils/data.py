"""Data sets as uint8 tensors, and batches that are functions of (seed, step).

A whole data set is on the training device, [N, 3, H, W] uint8. Crop, flip and noise are vectorised
there. There are no worker processes.
"""

import hashlib
import os
import pickle
import socket
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from samplers import to_pixels
from utils import distributed, own_images
from utils.program import InputError, Unavailable
from utils.seeding import generator

SPLIT_SEED = 1234  # the released code's seed for its validation images
DOWNLOAD_TIMEOUT = 30  # seconds without an answer; torchvision has no timeout


class Spec(NamedTuple):
    """The settings of a data set. ``pad`` and ``flip`` are the training augmentation."""

    names: tuple  # of the classes
    size: int  # side of its images
    pad: int | None  # None: an eighth of the side
    flip: bool
    n_valid: int | None  # None: its own validation split, or else a tenth of the training images
    files: str = ""  # its files under --data_root
    source: str = ""  # its class in torchvision.datasets
    sizes: tuple = ()  # other possible sides

    @property
    def n_classes(self):
        return len(self.names)

    def image_size(self, side):
        """``side``, or the data set's default for None. InputError if that size is impossible."""
        if side not in (None, self.size, *self.sizes):
            raise InputError(f"--image_size {side}: this data set has images of "
                             f"{', '.join(map(str, sorted({self.size, *self.sizes})))} pixels")
        return side or self.size


def numbers(n):
    return tuple(str(k) for k in range(n))


CIFAR10 = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLOTHES = ("top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "boot")
STL10 = ("plane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

SPECS = {
    "cifar10": Spec(CIFAR10, 32, 4, True, 5000, "cifar-10-batches-py/", "CIFAR10"),
    "cifar100": Spec(numbers(100), 32, 4, True, 5000, "cifar-100-python/", "CIFAR100"),
    "svhn": Spec(numbers(10), 32, 4, False, 5000, "train_32x32.mat and test_32x32.mat", "SVHN"),
    "mnist": Spec(numbers(10), 32, 4, False, 5000, "MNIST/raw/", "MNIST"),
    "fashion_mnist": Spec(CLOTHES, 32, 4, True, 5000, "FashionMNIST/raw/", "FashionMNIST"),
    "stl10": Spec(STL10, 32, None, True, 500, "stl10_binary/", "STL10", (96,)),
    "digits": Spec(numbers(10), 16, 2, False, 137, "nothing: it comes with scikit-learn",
                   sizes=(32,)),
}


def spec_of(name):
    """The Spec of a data set in the table, or of your own images (see own_images.py).

    Reads no images. InputError for an unknown data set.
    """
    if own_images.is_own(name):
        return Spec(own_images.class_names(name), 32, None, False, None,
                    sizes=tuple(range(16, 257, 4)))
    if name not in SPECS:
        raise InputError(f"unknown data set {name!r}: choose from {', '.join(SPECS)}, folder:PATH, "
                         "npz:FILE")
    return SPECS[name]


class Images(NamedTuple):
    """A split: ``x`` uint8 [N, 3, H, W], ``y`` int64 [N], and notes for the records.

    ``about`` tells how the split was made and how many images were left out.
    """

    x: torch.Tensor
    y: torch.Tensor
    about: dict = {}

    def take(self, indices):
        return Images(self.x[indices], self.y[indices], self.about)

    def to(self, device):
        return Images(self.x.to(device), self.y.to(device), self.about)

    def digest(self):
        """SHA-256 of the pixels and labels, which identifies the data."""
        sha = hashlib.sha256(self.x.cpu().numpy())
        sha.update(self.y.cpu().numpy())
        return sha.hexdigest()


def digits(train, size):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, bilinearly upscaled to size x size RGB.

    The split is fixed: 360 test images, 1,437 for training and validation.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    order = order[360:] if train else order[:360]
    grey = torch.from_numpy(images[order] / 16.0).float().view(-1, 1, 8, 8)
    grey = F.interpolate(grey, size=(size, size), mode="bilinear", align_corners=False)
    x = (grey * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    return Images(x, torch.from_numpy(labels[order]).long())


def from_torchvision(name, train, root, download):
    """The train or test split of a data set, read by torchvision."""
    import torchvision.datasets as tv

    split = "train" if train else "test"
    words = {"split": split} if name in ("svhn", "stl10") else {"train": train}
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with distributed.first_goes_ahead():
            dataset = getattr(tv, SPECS[name].source)(
                str(root), download=download and distributed.rank() == 0, **words)
    except (RuntimeError, OSError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "check the network, or put" if download else "drop --no-download to fetch it, or put"
        raise Unavailable(f"{name} is not complete under {os.path.abspath(root)}: {hint} "
                          f"{SPECS[name].files} there (--data_root) [{reason}]") from error
    finally:
        socket.setdefaulttimeout(before)
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
    return Images(as_rgb(torch.as_tensor(dataset.data)), torch.as_tensor(labels).long())


def as_rgb(x):
    """Images uint8 [N, 3, H, W] from [N, 3, H, W], [N, H, W, 3] or grey [N, 28, 28].

    Grey images get a black frame to 32 x 32, as for LeNet.
    """
    if x.dim() == 3:
        return F.pad(x, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1).contiguous()
    return (x.permute(0, 3, 1, 2) if x.shape[-1] == 3 else x).contiguous()


def load(name, root, *, train, download=False, size=None):
    """One split of the data set ``name`` as ``Images``, with images of side ``size`` if given.

    InputError tells which files are missing and where they belong.
    """
    if own_images.is_own(name):
        return own_splits(name, root, size)["train" if train else "test"]
    size = spec_of(name).image_size(size)
    if name == "digits":
        return digits(train, size)
    if not download and not Path(root).is_dir():
        raise Unavailable(f"no data folder {os.path.abspath(root)}: name one with --data_root, or "
                          "drop --no-download")
    images = from_torchvision(name, train, root, download)
    if images.x.shape[-1] != size:
        import torchvision.transforms.functional as TF  # here: it takes seconds

        images = images._replace(x=TF.resize(images.x, [size, size], antialias=True))
    return images


def own_splits(name, root, size=None):
    """{"train", "test" and perhaps "valid": Images} of your own images."""
    splits, about = own_images.load(name, spec_of(name).image_size(size), root)
    return {split: Images(x, y, about) for split, (x, y) in splits.items()}


def load_splits(name, root, *, n_valid=None, n_train=None, download=False, size=None):
    """The splits (train, validation, test) of a data set as ``Images``.

    The training images are shuffled by a fixed seed, as in the released code. Validation is the
    data set's own split, or the first ``n_valid`` of them (by default a tenth of your own images).
    Train is the next ``n_train`` images, or all others.
    """
    if own_images.is_own(name):
        own = own_splits(name, root, size)
        full, test, valid = own["train"], own["test"], own.get("valid")
        if valid is not None and n_valid is not None:
            raise InputError(f"{name} has a validation split of its own: drop --n_valid")
        n_valid = (0 if valid else len(full.y) // 10) if n_valid is None else n_valid
    else:
        full = load(name, root, train=True, download=download, size=size)
        test, valid = load(name, root, train=False, download=download, size=size), None
    if not 0 <= n_valid < len(full.y):
        raise InputError(f"--n_valid {n_valid} leaves no training image of {len(full.y)}")
    order = list(range(len(full.y)))
    np.random.RandomState(SPLIT_SEED).shuffle(order)
    if n_train is not None and n_train > len(order) - n_valid:
        raise InputError(f"--n_train {n_train}: there are {len(order) - n_valid} training images")
    train = order[n_valid:] if n_train is None else order[n_valid:n_valid + n_train]
    return full.take(train), valid or full.take(order[:n_valid]), test


def first_of_each_class(y, n, n_classes):
    """Ascending indices int64 [n * n_classes] of the first ``n`` images of each class.

    ``y`` [N] are the labels. InputError if a class has fewer than ``n``.
    """
    counts = y.bincount(minlength=n_classes)
    if (counts < n).any():
        raise InputError(f"--labels_per_class {n}: class {int(counts.argmin())} has only "
                         f"{int(counts.min())} training images")
    return torch.cat([(y == k).nonzero().squeeze(1)[:n] for k in range(n_classes)]).sort().values


def labelled(images, n, n_classes):
    """The training images whose labels a run with --labels_per_class ``n`` uses (0: all).

    They do not depend on the run's seed, because the split is shuffled by a fixed seed.
    """
    return images.take(first_of_each_class(images.y, n, n_classes)) if n else images


def reflect(index, size):
    """Mirror positions outside 0 .. size-1 at the border pixels, as reflect padding does."""
    index = index.abs()
    return torch.where(index > size - 1, 2 * (size - 1) - index, index)


def crop_and_flip(x, indices, pad, mirrored, generator):
    """Augment the images x[indices]: uint8 [B, C, H, W].

    Each is reflect-padded by ``pad`` and cropped at random. ``mirrored`` (bool [B] or None) says
    which are flipped. A single gather does this without a padded copy.
    """
    n, (height, width), device = len(indices), x.shape[-2:], x.device
    shift = torch.randint(-pad, pad + 1, (2, n, 1), generator=generator, device=device)
    rows = reflect(torch.arange(height, device=device) + shift[0], height)
    columns = reflect(torch.arange(width, device=device) + shift[1], width)
    if mirrored is not None:
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1)
    images = x[indices]
    return images.flatten(2).gather(2, pixels.expand(-1, x.shape[1], -1)).view_as(images)


class TrainData:
    """Augmented, noisy training batches. Every batch is a function of (seed, step, part) alone.

    ``batch(step, part)`` returns x_pos for p(x) and (x_lab, y_lab) for p(y|x). Images are float32
    [B, 3, H, W] on the device, labels are on the host. The two batches follow independent epoch
    orders, as in the released code. With ``shared_batch`` they are one batch (Algorithm 2). An
    epoch counts labelled images. Its last, partial batch is dropped.

    A step's global batch has ``parts`` parts (processes x accumulated passes). Each part has
    ``batch_size`` images for p(x) and its share of ``labelled_batch`` (by default as many) for
    p(y|x). No image is in two parts.

    With ``labels_per_class`` > 0, only that many images of each class have labels. p(x) still uses
    all images. The labelled batches run through one order of the labelled images after another,
    and a batch may continue into the next order. So all labels are used equally often, even if a
    batch is larger than their number. The steps per epoch do not change: all training images /
    labelled batch. So epochs and schedules take the same time with few labels.
    """

    def __init__(self, images, spec, *, batch_size, sigma, seed, labelled_batch=None, parts=1,
                 shared_batch=False, clean_p_x=False, alternating_flip=False, labels_per_class=0):
        self.sizes = {"labelled": labelled_batch or parts * batch_size,
                      "unlabelled": parts * batch_size}
        if max(self.sizes.values()) > len(images.y):
            raise InputError(f"a batch of {max(self.sizes.values())} is larger than the "
                             f"{len(images.y)} training images")
        self.images, self.spec, self.sigma, self.seed, self.parts = images, spec, sigma, seed, parts
        self.shared_batch, self.clean_p_x = shared_batch, clean_p_x
        self.alternating_flip, self.labels = alternating_flip, images.y.cpu()
        self.device = images.x.device
        self.steps_per_epoch = self.epoch_steps("labelled")
        self.few = None  # indices of the labelled images, or None if all are labelled
        if labels_per_class:
            self.few = first_of_each_class(self.labels, labels_per_class, spec.n_classes)
        self.orders = {}

    def epoch_steps(self, kind):
        return len(self.images.y) // self.sizes[kind]

    def reseed(self, seed):
        """Use other epoch orders, crops and noise from here on (after a rollback)."""
        self.seed, self.orders = seed, {}

    def order(self, kind, turn):
        """Indices (on the host) of all images of ``kind`` in the order of pass number ``turn``."""
        if self.orders.get(kind, (None, None))[0] != turn:
            pool = self.few if kind == "labelled" else None
            order = torch.randperm(len(self.labels) if pool is None else len(pool),
                                   generator=generator("cpu", self.seed, "order", kind, turn))
            self.orders[kind] = turn, order if pool is None else pool[order]
        return self.orders[kind][1]

    def places(self, kind, step, part=0):
        """(pass numbers [B], places in the order of that pass [B]) of one part of ``step``."""
        size = self.sizes[kind] // self.parts
        within = part * size + torch.arange(size)
        if kind == "labelled" and self.few is not None:  # no partial batch is dropped
            place = step * self.sizes[kind] + within
            return place // len(self.few), place % len(self.few)
        epoch, position = divmod(step, self.epoch_steps(kind))
        return torch.full((size,), epoch), position * self.sizes[kind] + within

    def indices(self, kind, step, part=0):
        """Indices [B] (on the host) of the images in one part of ``step``."""
        turns, places = self.places(kind, step, part)
        return torch.cat([self.order(kind, turn)[places[turns == turn]]
                          for turn in turns.unique().tolist()])

    def mirrored(self, indices, turns, random):
        """Which of the images ``indices`` [B], from the passes ``turns`` [B], to flip: bool [B].

        None if the data set is not flipped.
        """
        if not self.spec.flip:
            return None
        if not self.alternating_flip:
            return torch.rand(len(indices), generator=random, device=self.device) < 0.5
        first = torch.rand(len(self.labels), generator=generator("cpu", self.seed, "flip")) < 0.5
        return (first[indices] ^ (turns % 2 == 1)).to(self.device, non_blocking=True)

    def draw(self, kind, step, part=0):
        """(x, y) of one kind: cropped, flipped, scaled to [-1, 1], plus noise, not clamped."""
        indices = self.indices(kind, step, part)
        y, on_device = self.labels[indices], indices.to(self.device, non_blocking=True)
        if kind == "unlabelled" and self.clean_p_x:
            return to_pixels(self.images.x[on_device]), y
        noise = generator(self.device, self.seed, "augment", kind, step, part)
        mirrored = self.mirrored(indices, self.places(kind, step, part)[0], noise)
        x = crop_and_flip(self.images.x, on_device, self.spec.pad, mirrored, noise)
        x = to_pixels(x)
        if self.sigma:
            x += self.sigma * torch.randn(x.shape, generator=noise, device=x.device)
        return x, y

    def batch(self, step, part=0):
        x_lab, y_lab = self.draw("labelled", step, part)
        x_pos = x_lab if self.shared_batch else self.draw("unlabelled", step, part)[0]
        return x_pos, (x_lab, y_lab)
