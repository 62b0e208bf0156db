"""A checkpoint under evaluation: its network, settings, data and chains, and the output files."""

import copy
import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from models import frozen, has_batch_norm
from samplers import in_company, make_init, make_sampler, sampler_name
from samplers.pyld import is_affine
from utils import distributed, plots
from utils.data import labelled, load_splits, spec_of
from utils.evaluation import ood
from utils.evaluation.inference import predict, recalibrated
from utils.files.checkpoint import Opened
from utils.files.records import replacing
from utils.machine import check_memory
from utils.own_images import is_own, sets_aside
from utils.program import InputError, Unavailable, say
from utils.seeding import generator, seed_layers, seed_step

MADE = ("buffer", "scratch", "p0")  # sources of images that a model makes ...
SOURCES = (*MADE, "train", "test")  # ... and real ones, beside the out sets


class Output(NamedTuple):
    """Writes raw scores and pictures beside the results file, named after label and checkpoint.

    Both methods return the file's name, for the record.
    """

    folder: Path
    stem: str

    def npz(self, name, **arrays):
        name = f"{self.stem}_{name}.npz"
        if distributed.rank() == 0:
            with replacing(self.folder / name) as file:
                np.savez_compressed(file, **arrays)
        return name

    def figure(self, name, figure):
        name = f"{self.stem}_{name}.png"
        if distributed.rank() == 0:
            plots.save_figure(self.folder / name, figure)
        return name


class Number(NamedTuple):
    """One measured value.

    ``protocol`` holds everything that its meaning depends on. ``files`` hold its raw data or show
    it.
    """

    metric: str
    value: float
    unit: str
    n: int
    protocol: dict
    files: tuple = ()


def skip(what, error):
    """Print one line that ``what`` is left out. The other evaluations continue."""
    if distributed.rank() == 0:
        print(f"left out: {what}: {error}", file=sys.stderr)


@dataclass
class Subject:
    """A checkpoint under evaluation, with its settings. Its data are loaded on first use.

    The settings are the flags of the same names (utils/flags.py).
    """

    opened: Opened
    label: str
    device: torch.device
    # the data
    dataset: str
    data_root: str
    image_size: int
    n_valid: int | None
    n_train: int | None
    labels_per_class: int
    class_names: list
    download: bool
    # passes
    batch_size: int
    recalibrate_bn: int
    seed: int
    # generated images and fresh chains
    source: str
    n_samples: int | None
    conditional: bool
    y: list | None
    init: str
    sample_mode: str
    chain_steps: int
    chain_batch: int
    company: int
    # the sampler
    n_steps: int
    in_steps: int
    pyld_lr: float
    sgld_lr: float
    sgld_std: float
    eps: float
    step_decay: float
    pixel_clamp: bool
    literal_pyld: bool

    model: torch.nn.Module = field(init=False)
    kept: dict = field(init=False, default_factory=dict)  # results that evaluations share

    def __post_init__(self):
        self.model = self.opened.model.to(self.device).eval()
        if self.recalibrate_bn and not has_batch_norm(self.model):
            say(f"{self.label} has no batch norm: --recalibrate_bn is left out")
            self.recalibrate_bn = 0
        if self.recalibrate_bn:
            x = self.images("train", self.recalibrate_bn).x
            self.model = recalibrated(self.model, x, self.batch_size)
            self.model.eval()

    @functools.cached_property
    def splits(self):
        """{train, valid, test} as Images on the device."""
        parts = load_splits(self.dataset, self.data_root, n_valid=self.n_valid,
                            n_train=self.n_train, download=self.download, size=self.image_size)
        n_classes = self.model.config["n_classes"]
        self.check_split(parts[0])
        if (there := spec_of(self.dataset).n_classes) != n_classes:
            raise InputError(f"{self.label} knows {n_classes} classes, {self.dataset} has {there}: "
                             "choose another --dataset")
        then, now = (self.opened.args or {}), list(spec_of(self.dataset).names)
        if is_own(self.dataset) and is_own(then.get("dataset", "")) and now != then.get(
                "class_names", now):
            raise InputError(f"{self.label} knows the classes {', '.join(then['class_names'])}, "
                             f"{self.dataset} has {', '.join(now)}: give them the same names")
        return dict(zip(("train", "valid", "test"), (p.to(self.device) for p in parts),
                        strict=True))

    def check_split(self, train):
        """InputError if the fifth of a folder that is set aside for testing is another one now.

        Then test images may have been trained on. ``train`` are the training images now.
        """
        args, then = self.opened.args, self.opened.p0
        same = then and all(args.get(name) == getattr(self, name)
                            for name in ("dataset", "image_size", "n_train", "n_valid"))
        if same and sets_aside(self.dataset) and train.digest() != then.get("train_sha256"):
            raise InputError(f"{self.label} was trained on other images than {self.dataset} holds "
                             "now, so another fifth of them is set aside for testing: restore "
                             "them, or put train/ and test/ there")

    def images(self, split="test", limit=None):
        """The first ``limit`` images of a split, or all if it has fewer or ``limit`` is None."""
        return self.splits[split].take(slice(limit))

    def logits(self, split="test", limit=None, sigma=0.0):
        """(logits float64 [n, K], labels [n]) on the CPU, computed once."""
        key = "logits", split, limit, sigma
        if key not in self.kept:
            images = self.images(split, limit)
            if not len(images.y):
                raise InputError(f"the {split} split is empty (--n_valid 0)")
            logits = predict(self.model, images.x, self.batch_size, sigma, self.seed)
            self.kept[key] = self.finite(logits).double().cpu(), images.y.cpu()
        return self.kept[key]

    def finite(self, values):
        """Return ``values``, outputs of the network. InputError if one is NaN or infinite."""
        if not torch.isfinite(values).all():
            raise InputError(f"{self.label}: the network's outputs are not finite")
        return values

    @functools.cached_property
    def p0(self):
        """The distribution p_0 where fresh chains start, fitted as in training."""
        n_classes = self.model.config["n_classes"]
        train = labelled(self.splits["train"], self.labels_per_class, n_classes)
        try:
            return make_init(self.init, train.x, train.y, n_classes)
        except ValueError as error:
            raise InputError(f"{error}: raise --n_train") from error

    def buffer(self):
        """The replay buffer [n, 3, H, W] in [-1, 1]. Unavailable if the file has none."""
        buffer = self.opened.buffer
        if buffer is None:
            raise Unavailable(f"{self.label} holds no replay buffer: sample afresh with "
                              "--source scratch")
        if not torch.isfinite(buffer).all():
            raise InputError(f"{self.label}: its replay buffer is not finite")
        return buffer.float()

    @property
    def sampler(self):
        """The sampler of fresh chains in the paper's words, "PYLD-1000-5"."""
        return sampler_name(self, self.chain_steps)

    def classes(self, indices):
        """The classes [n] of the fresh chains ``indices`` [n], or None for unconditional ones.

        With --conditional all classes take turns, with --y the classes that it lists.
        """
        if not (self.conditional or self.y):
            return None
        n_classes = self.model.config["n_classes"]
        numbers = {str(k): k for k in range(n_classes)}
        known = numbers | {name: k for k, name in enumerate(self.class_names[:n_classes])}
        if unknown := [word for word in self.y or [] if word not in known]:
            raise InputError(f"--y {unknown[0]}: the classes of {self.label} are "
                             f"{', '.join(map(str, self.class_names[:n_classes]))}")
        turns = torch.tensor([known[word] for word in self.y] if self.y else range(n_classes))
        return turns[torch.as_tensor(indices) % len(turns)]

    def chain_runner(self, snapshots=1):
        """A function ``run(b, n, y)`` that draws the ``n`` chains of batch ``b``.

        It returns a list of x [n, 3, H, W] (CPU) at 0, 1/s, ..., 1 of --chain_steps. ``y`` [n] are
        classes, or None.

        The sampler is that of training with --chain_steps steps. --sample_mode sets the mode of
        batch norm. In training mode the statistics depend on the batch, so the batch size is part
        of the protocol, and so is --company: in training a fresh chain shares its batch with older
        ones. Batch b depends on (seed, b). The evaluated network stays unchanged.
        """
        if self.in_steps and not self.literal_pyld and not is_affine(self.model.stem):
            raise InputError(f"{self.label}: its stem is not affine, which PYLD's short cut needs: "
                             "add --literal_pyld")
        model = copy.deepcopy(self.model).train(self.sample_mode == "train")
        each = [(self.chain_steps + k) // snapshots for k in reversed(range(snapshots))]
        draws = [self.drawer(n_steps, sum(each[:k])) for k, n_steps in enumerate(each)]
        p0 = self.p0

        def run(batch, n, y):
            streams = seed_step(self.seed, batch, "evaluation", self.device)
            seed_layers(self.seed, batch, "evaluation")
            x = p0.sample(n, y, host=streams.host, generator=streams.device)
            y = None if y is None else y.to(self.device)
            stations = [x.cpu()]
            with frozen(model):
                for draw in draws:
                    x = draw(model, x, y=y, generator=streams.device)
                    stations.append(x.cpu())
            return stations

        return run

    def drawer(self, n_steps, before):
        """The training sampler with ``n_steps`` steps after ``before`` others, in company.

        With --company c, c images of the buffer share the batch, others every M (--n_steps) steps.
        Chains of classes descend for them the energy of the class that the network sees in them.
        """
        if not self.company:
            return make_sampler(self, n_steps, before)
        return in_company(self, n_steps, *self.crowd, self.company, before)

    @functools.cached_property
    def crowd(self):
        """The buffer's images and the classes that the network sees in them, on the device."""
        check_memory(4 * 3 * self.image_size**2 * self.company, self.device,
                     f"--company {self.company}")
        x = self.buffer().to(self.device)
        return x, predict(self.model, plots.to_uint8(x), self.batch_size).argmax(1).to(self.device)

    def chains(self, n, y=None, snapshots=1):
        """``n`` fresh chains, as ``chain_runner`` draws them. ``y`` are classes, or None.

        They run in whole batches of --chain_batch, so that chain i depends on (seed, i) and not on
        ``n``. ``y`` may have classes for all of the last batch, or else begins again there.
        """
        run, size = self.chain_runner(snapshots), self.chain_batch

        def work(batch):
            turns = torch.arange(batch * size, (batch + 1) * size)
            return run(batch, size, None if y is None else y[turns % len(y)])

        batches = distributed.spread(work, range(-(-n // size)), "chains")
        return self.finite_chains([torch.cat(parts)[:n] for parts in zip(*batches, strict=True)])

    def finite_chains(self, stations):
        """Return ``stations``. InputError if a chain has diverged."""
        if not torch.isfinite(stations[-1]).all():
            raise InputError(f"{self.label}: its chains diverge to infinity")
        return stations

    def n_generated(self):
        """The number of images that --source and --n_samples ask for."""
        if self.source in ("scratch", "p0"):
            return self.n_samples or 1000
        n = len(self.buffer() if self.source == "buffer" else self.real[0])
        if self.n_samples is not None and self.n_samples > n:
            raise InputError(f"--n_samples {self.n_samples}: {self.source} holds {n} images")
        return self.n_samples or n

    @functools.cached_property
    def real(self):
        """The images of --source train, test or an out set, uint8, and notes on their origin."""
        if self.source in ("train", "test"):
            return self.images(self.source).x.cpu(), {}
        return ood.out_set(self.source, self.image_size, in_x=self.images().x, seed=self.seed,
                           root=self.data_root, download=self.download, n=self.n_samples)

    def generated(self):
        """(images uint8 [n, 3, H, W] on the CPU, the protocol of their origin).

        --source buffer: all of the buffer, or --n_samples at random. --source scratch: fresh
        chains, drawn once. p0: where they start. train, test or an out set: its first images.
        """
        n = self.n_generated()
        if self.source == "p0":
            streams = seed_step(self.seed, 0, "evaluation", self.device)
            x = self.p0.sample(n, None, host=streams.host, generator=streams.device)
            return plots.to_uint8(x).cpu(), {"source": "p0", "init": self.init}
        if self.source not in MADE:
            x, about = self.real
            return x[:n], {"source": ood.name_and_source(self.source)[0], **about}
        if self.source == "buffer":
            # a buffer may be sorted by class, but the Inception Score's splits must not be
            x = self.buffer()
            order = torch.randperm(len(x), generator=generator("cpu", self.seed, "buffer order"))
            return plots.to_uint8(x[order[:n]]), {"source": "buffer"}
        if "chains" not in self.kept:
            whole = -(-n // self.chain_batch) * self.chain_batch  # classes of whole batches
            self.kept["chains"] = plots.to_uint8(
                self.chains(n, self.classes(range(whole)))[-1])
        return self.kept["chains"], {
            "source": "scratch", "chain_steps": self.chain_steps, "chain_batch": self.chain_batch,
            **({"company": self.company} if self.company else {}),
            "init": self.init, "mode": self.sample_mode,
            **({"conditional": self.y or "all classes"} if self.conditional or self.y else {})}

    def title(self, words, n):
        return f"{words}\n{self.label}, {self.dataset}, n = {n}"
