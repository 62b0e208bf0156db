"""Where chains start: the class Gaussians of Eq. 14, or JEM's uniform noise."""

import torch


def to_pixels(images):
    """Convert uint8 in 0..255 to float32 in [-1, 1]. All input goes through here."""
    return images.float().div_(127.5).sub_(1)


def weighted_sum(z, images):
    """z [n] @ uint8 images [n, d], as float32 [d]. Compiled, it is one pass over the images."""
    return (z[:, None] * images.float()).sum(0)


class ClassGaussians:
    """p_0(x) = sum_y pi_y N(mu_y, Sigma_y + ridge * I), sampled exactly (Eq. 14).

    No covariance is ever formed: with the n images of a class as the rows of X and z ~ N(0, I_n),

        mu + (z - mean(z)) @ X / sqrt(n) + sqrt(ridge) * eps

    has mean mu and covariance Sigma + ridge * I exactly, and costs one pass over the class. The
    only state is a uint8 copy of the data set, sorted by class. So there is no slow fit and no
    cache, and 100 classes take no more memory than 10.
    """

    ridge = 1e-4
    rows = 512  # images converted to floats at a time, so that they fit a CPU's cache
    floats = 2**28  # or so many numbers at a time, on a GPU and for the means: 1 GiB
    few = 8  # up to this many draws of a class, compiled passes are faster than a matrix product

    @classmethod
    def fit(cls, x, y, n_classes, pixels=(-1.0, 1.0), compiled=False):
        """Fit to images ``x`` uint8 [n, C, H, W] with labels ``y`` [n].

        ``compiled``: use torch.compile for few draws on a CPU. ValueError if a class has no image.
        """
        self = cls()
        self.pixels, self.shape, self.device = pixels, tuple(x.shape[1:]), x.device
        counts = y.cpu().bincount(minlength=n_classes)
        if (counts == 0).any():
            empty = int((counts == 0).nonzero()[0])
            raise ValueError(f"class {empty} has no training image to estimate its Gaussian from")
        self.pi = counts / counts.sum()
        order = y.argsort(stable=True).to(x.device)
        self.classes = x.flatten(1)[order].split(counts.tolist())  # [n_k, C*H*W] each
        self.centres = torch.stack([self.centre(images) for images in self.classes])
        self.weighted_sum = None
        if compiled and x.device.type == "cpu":
            self.weighted_sum = torch.compile(weighted_sum, fullgraph=True, dynamic=True)
        return self

    def class_images(self, k):
        """The images of class ``k`` in [-1, 1], one per row [n_k, C*H*W]."""
        return to_pixels(self.classes[k])

    def centre(self, images):
        """The mean of uint8 images [n, C*H*W] in [-1, 1], a part of them at a time."""
        parts = images.split(max(self.rows, self.floats // images.shape[1]))
        if len(parts) == 1:
            return to_pixels(images).mean(0)
        return sum(to_pixels(part).sum(0) for part in parts) / len(images)

    def means(self):
        """The class centres mu_y [K, C, H, W] (Figs 2, 7, 8)."""
        return self.centres.view(-1, *self.shape)

    def sample(self, n, y=None, *, host, generator):
        """Draw x [n, C, H, W], clamped to ``pixels``; y ~ pi unless labels ``y`` [n] are given.

        ``host`` draws the classes on the CPU (so that nothing waits for the device), ``generator``
        the Gaussians on the device.
        """
        device = self.device
        if y is None:
            y = torch.multinomial(self.pi, n, replacement=True, generator=host)
        x = torch.empty(n, self.centres.shape[1], device=device)
        for k in y.unique().tolist():
            rows, images = (y == k).nonzero().squeeze(1), self.classes[k]
            # z is centred: the shift of to_pixels drops out of the products, its scale is in z
            z = torch.randn(len(rows), len(images), device=device, generator=generator)
            z = (z - z.mean(1, keepdim=True)) / (127.5 * len(images) ** 0.5)
            eps = torch.randn(len(rows), x.shape[1], device=device, generator=generator)
            draws = torch.add(self.centres[k], eps, alpha=self.ridge**0.5)
            if self.weighted_sum and len(rows) <= self.few:
                draws += torch.stack([self.weighted_sum(row, images) for row in z])
            else:
                chunk = self.rows
                if device.type == "cuda":
                    chunk = max(chunk, self.floats // x.shape[1])
                for z_part, part in zip(z.split(chunk, 1), images.split(chunk), strict=True):
                    draws.addmm_(z_part, part.float())
            x[rows.to(device, non_blocking=True)] = draws
        if self.pixels is not None:
            x.clamp_(*self.pixels)
        return x.view(n, *self.shape)


class UniformInit:
    """JEM's p_0: every pixel uniform in [-1, 1], whatever the class."""

    def __init__(self, shape, device):
        self.shape, self.device = tuple(shape), device

    def sample(self, n, y=None, *, host, generator):
        """Draw x [n, C, H, W]. ``y`` and ``host`` are ignored. ClassGaussians needs them."""
        return torch.rand(n, *self.shape, device=self.device, generator=generator) * 2 - 1
