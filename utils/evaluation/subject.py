"""A checkpoint under evaluation: its network, settings, data and chains, and where output goes."""

import argparse
import copy
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from models import frozen
from samplers import make_init, make_sampler
from utils import distributed, plots
from utils.data import load_splits, spec_of
from utils.evaluation.inference import predict
from utils.files.checkpoint import Opened
from utils.files.records import replacing
from utils.program import InputError, Unavailable
from utils.seeding import generator, seed_step


class Output(NamedTuple):
    """Where raw scores and pictures go: beside the results file, named after the checkpoint."""

    folder: Path
    stem: str

    def npz(self, name, **arrays):
        if distributed.rank():
            return  # the first process writes
        with replacing(self.folder / f"{self.stem}_{name}.npz") as file:
            np.savez_compressed(file, **arrays)

    def figure(self, name, figure):
        if distributed.rank() == 0:
            plots.save_figure(self.folder / f"{self.stem}_{name}.png", figure)


@dataclass
class Subject:
    """A checkpoint under evaluation: its file, the settings in force, its data when asked for."""

    opened: Opened
    args: argparse.Namespace
    label: str
    device: torch.device
    model: torch.nn.Module = field(init=False)

    def __post_init__(self):
        self.model = self.opened.model.to(self.device).eval()

    @functools.cached_property
    def splits(self):
        """{train, valid, test} as Images on the device."""
        a = self.args
        parts = load_splits(a.dataset, a.data_root, n_valid=a.n_valid, n_train=a.n_train,
                            download=a.download, size=a.image_size)
        n_classes = self.model.config["n_classes"]
        if (there := spec_of(a.dataset).n_classes) != n_classes:
            raise InputError(f"{self.label} knows {n_classes} classes, {a.dataset} has {there}: "
                             "choose another --dataset")
        return dict(zip(("train", "valid", "test"), (p.to(self.device) for p in parts),
                        strict=True))

    def images(self, split="test", limit=None):
        """The first ``limit`` images of a split (None: all)."""
        images = self.splits[split]
        if limit is not None and limit > len(images.y):
            raise InputError(f"{limit} images were asked for, the {split} split of "
                             f"{self.args.dataset} has {len(images.y)}")
        return images if limit is None else images.take(slice(limit))

    def logits(self, split="test", limit=None, sigma=0.0):
        """Logits float64 [n, K] on the CPU, and labels."""
        images = self.images(split, limit)
        if not len(images.y):
            raise InputError(f"the {split} split is empty (--n_valid 0)")
        logits = predict(self.model, images.x, self.args.batch_size, sigma, self.args.seed)
        if not torch.isfinite(logits).all():
            raise InputError(f"{self.label}: logits of the {split} split are not finite")
        return logits.double().cpu(), images.y.cpu()

    @functools.cached_property
    def p0(self):
        """Where fresh chains start, from the training images as in training."""
        train = self.splits["train"]
        try:
            return make_init(self.args.init, train.x, train.y, self.model.config["n_classes"])
        except ValueError as error:
            raise InputError(f"{error}: raise --n_train") from error

    def buffer(self):
        """The replay buffer [n, 3, H, W] in [-1, 1]; InputError where the file has none."""
        buffer = self.opened.buffer
        if buffer is None:
            raise Unavailable(f"{self.label} holds no replay buffer: sample afresh with "
                              "--source scratch")
        if not torch.isfinite(buffer).all():
            raise InputError(f"{self.label}: its replay buffer is not finite")
        return buffer.float()

    def chains(self, n, y=None, snapshots=1):
        """Fresh chains: a list of x [n, 3, H, W] (CPU) at 0, 1/s, ..., 1 of --chain_steps.

        The training sampler, --n_steps swapped for --chain_steps, in the training mode of batch
        norm: a chain's batch decides its statistics, so the batch size is part of the protocol.
        Batch b depends on (seed, b). The evaluated network's running statistics stay untouched.
        """
        a = self.args
        model = copy.deepcopy(self.model).train(a.sample_mode == "train")
        each = [len(p) for p in torch.arange(a.chain_steps).tensor_split(snapshots)]
        draws = [make_sampler(argparse.Namespace(**vars(a) | {"n_steps": k})) for k in each]
        p0 = self.p0

        def run(batch_and_indices):
            batch, indices = batch_and_indices
            streams = seed_step(a.seed, batch, "evaluation", self.device)
            labels = None if y is None else y[indices]
            x = p0.sample(len(indices), labels, host=streams.host, generator=streams.device)
            labels = None if labels is None else labels.to(self.device)
            stations = [x.cpu()]
            for draw in draws:
                x = draw(model, x, y=labels, generator=streams.device)
                stations.append(x.cpu())
            return stations

        with frozen(model):
            batches = distributed.spread(run, enumerate(torch.arange(n).split(a.chain_batch)),
                                         "chains")
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]

    def n_generated(self):
        """How many images --source and --n_samples ask for."""
        a = self.args
        if a.source != "buffer":
            return a.n_samples or 1000
        n = len(self.buffer())
        if a.n_samples is not None and a.n_samples > n:
            raise InputError(f"--n_samples {a.n_samples}: the buffer holds {n} images")
        return a.n_samples or n

    def generated(self):
        """Images to judge, uint8 [n, 3, H, W] on the CPU, and the protocol words of their origin:
        --source buffer (all of it, or --n_samples at random) or scratch."""
        a, n = self.args, self.n_generated()
        if a.source == "buffer":
            # a buffer may lie in blocks by class, which the Inception Score's splits must not
            x = self.buffer()
            order = torch.randperm(len(x), generator=generator("cpu", a.seed, "buffer order"))
            return plots.to_uint8(x[order[:n]]), {"source": "buffer"}
        x = self.chains(n)[-1]
        if not torch.isfinite(x).all():
            raise InputError(f"{self.label}: its chains run off to infinity")
        return plots.to_uint8(x), {"source": "scratch", "chain_steps": a.chain_steps,
                                   "chain_batch": a.chain_batch, "init": a.init,
                                   "mode": a.sample_mode}

    def title(self, words, n):
        return f"{words}\n{self.label}, {self.args.dataset}, n = {n}"
