"""A trained model for use from Python: ``from utils import load_model``."""

import argparse
import copy
import functools
import warnings

import torch

from models import JEM, frozen, has_batch_norm
from samplers import in_company, make_init, make_sampler
from utils import cli
from utils.data import labelled, load_splits, spec_of
from utils.files.checkpoint import open_any
from utils.own_images import is_own, path_of
from utils.program import InputError, Unavailable
from utils.seeding import seed_step

CHAIN_BATCH = 100  # images that share their batch statistics, as in evaluation ...
COMPANY = 80  # ... of which so many are the buffer's
CHAIN_STEPS = 1000  # outer steps of a chain


def load_model(path, *, device="cpu", dataset=None, data_root=None):
    """Load a published folder or a checkpoint file, ours or a released one.

    Returns a ``LoadedModel`` on ``device`` in eval mode. Fresh chains need the training images.
    ``dataset`` and ``data_root`` override what the file says about them. Released files say
    nothing, so the defaults are then cifar10 and data. Nothing is downloaded. A one-line InputError
    for files that cannot be read.
    """
    opened = open_any(path)
    typed = {"dataset": dataset, "data_root": data_root}
    typed = {name: value for name, value in typed.items() if value is not None}
    settings = cli.evaluation_settings(opened.args, typed, argparse.Namespace())
    return LoadedModel(opened, argparse.Namespace(**settings)).to(device).eval()


class LoadedModel(JEM):
    """A ``JEM`` that samples with its training ``settings``.

    ``replay_buffer`` [n, 3, H, W] in [-1, 1] holds the buffer's images in its file, or is None.
    """

    def __init__(self, opened, settings):
        super().__init__(opened.model)
        self.settings, self.path = settings, opened.path
        self.register_buffer("replay_buffer", opened.buffer, persistent=False)

    @torch.inference_mode(False)
    def sample(self, n, y=None, n_steps=CHAIN_STEPS, start=None, seed=0):
        """``n`` images [n, 3, H, W] in [-1, 1], from chains of ``n_steps`` outer steps.

        Chains use the training sampler. With ``y`` (a class, or labels [n]) they descend E(x, y).
        ``start="p0"`` starts them from p_0, as in training. Estimating p_0 needs the training
        images. ``start="buffer"`` continues from images of the replay buffer, for a class drawn in
        proportion to p(y|x). ``None`` is "p0" if the training images are available, and otherwise
        "buffer", with a warning. InputError if there is neither. Chains share their batches with
        images of the replay buffer, as in training, where batch norm makes that matter. The images
        depend only on the arguments. The model does not change.
        """
        if start not in (None, "p0", "buffer"):
            raise InputError(f"start is 'p0', 'buffer' or None, not {start!r}")
        if n < 1 or n_steps < 0:
            raise InputError(f"{n} images by {n_steps} steps: at least 1 by 0 are needed")
        y = self.labels(n, y)
        draw, n_chains = self.drawer(n_steps)
        model = copy.deepcopy(JEM(self)).train(self.settings.sample_mode == "train")
        device, images = next(self.parameters()).device, []
        with frozen(model):
            for batch, indices in enumerate(torch.arange(n).split(n_chains)):
                streams = seed_step(seed, batch, "evaluation", device)
                labels = None if y is None else y[indices]
                x_0 = self.beginnings(len(indices), labels, start, streams.host).to(device)
                labels = None if labels is None else labels.to(device)
                images.append(draw(model, x_0, y=labels, generator=streams.device))
        return torch.cat(images)

    def drawer(self, n_steps):
        """The training sampler with ``n_steps`` steps, and the number of chains in a batch."""
        in_batches = self.settings.sample_mode == "train" and has_batch_norm(self)
        if self.replay_buffer is None or not in_batches:  # company would change nothing
            return make_sampler(self.settings, n_steps), CHAIN_BATCH
        classes = self.buffer_classes.argmax(1).to(self.replay_buffer.device)
        return (in_company(self.settings, n_steps, self.replay_buffer, classes, COMPANY),
                CHAIN_BATCH - COMPANY)

    def labels(self, n, y):
        """A class or labels as int64 [n], or None."""
        if y is None:
            return None
        n_classes = self.config["n_classes"]
        refused = InputError(f"y is a class or {n} of them, 0 to {n_classes - 1}")
        try:
            y = torch.as_tensor(y).cpu()
        except (TypeError, ValueError, RuntimeError) as error:  # no numbers, or beyond int64
            raise refused from error
        if (y.is_floating_point() or y.dim() > 1 or y.numel() not in (1, n)
                or not ((y >= 0) & (y < n_classes)).all()):
            raise refused
        return y.long().expand(n)

    def beginnings(self, n, y, start, host):
        """The chains' start x_0 [n, 3, H, W]. ``host`` is a generator on the CPU."""
        if start != "buffer":
            try:
                return self.of_its_size(self.p0.sample(n, y, host=host, generator=host))
            except Unavailable as error:
                if start == "p0" or self.replay_buffer is None:
                    raise InputError(f"fresh chains need the training images: {error}; give "
                                     "load_model their data_root") from error
                warnings.warn(f"chains go on from the replay buffer (start='buffer'): fresh ones "
                              f"need the training images, give load_model their data_root "
                              f"({error})", stacklevel=3)
        if self.replay_buffer is None:
            raise InputError(f"{self.path} holds no replay buffer to start from")
        if y is None:
            slots = torch.randint(len(self.replay_buffer), (n,), generator=host)
        else:
            weights = self.buffer_classes.T[y] + 1e-30  # p(y|x) of all images may underflow
            slots = torch.multinomial(weights, 1, generator=host).squeeze(1)
        return self.replay_buffer.cpu()[slots]

    def of_its_size(self, x):
        """Fresh images ``x``. InputError if those of the replay buffer have another size."""
        buffer = self.replay_buffer
        if buffer is not None and buffer.shape[1:] != x.shape[1:]:
            sides = (f"{'x'.join(map(str, images.shape[-2:]))} pixels" for images in (x, buffer))
            raise InputError(f"images of {self.settings.dataset} have {next(sides)}, those that "
                             f"{self.path} was trained on {next(sides)}: give load_model its "
                             "dataset")
        return x

    @functools.cached_property
    def p0(self):
        """p_0 of the training images, on the CPU. Unavailable if they are missing."""
        s, n_classes = self.settings, self.config["n_classes"]
        if is_own(s.dataset) and not path_of(s.dataset).exists():
            raise Unavailable(f"{s.dataset} is not there")
        if spec_of(s.dataset).n_classes != n_classes:
            raise Unavailable(f"{self.path} knows {n_classes} classes and {s.dataset} has "
                              f"{spec_of(s.dataset).n_classes}: give load_model its dataset")
        train, _, _ = load_splits(s.dataset, s.data_root, n_valid=s.n_valid, n_train=s.n_train,
                                  download=False, size=s.image_size)
        train = labelled(train, s.labels_per_class, n_classes)
        try:
            return make_init(s.init, train.x, train.y, n_classes)
        except ValueError as error:
            raise Unavailable(str(error)) from error

    @functools.cached_property
    @torch.no_grad()
    def buffer_classes(self):
        """p(y|x) [n, K] of the buffer's images, on the CPU."""
        model = copy.deepcopy(JEM(self)).eval()
        parts = [model.log_p_y_given_x(x).exp() for x in self.replay_buffer.split(500)]
        return torch.cat(parts).double().cpu()
