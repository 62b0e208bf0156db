"""Quality of generated images: Inception Score, FID, KID, and a Frechet distance of our own.

FID uses pytorch-fid's network, resizing and matrix square root, on images from memory. Different
tools give noticeably different numbers on the same images. So a record names the tool, the SHA-256
of the weights, the reference images, their number and any selection. Too few images raise
Unavailable, non-finite values InputError, wrong shapes ValueError.
"""

import contextlib
import http.client
import socket
import sys
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from scipy.special import rel_entr
from torch import nn

from utils import distributed
from utils.data import DOWNLOAD_TIMEOUT
from utils.evaluation.inference import predict
from utils.files import torch_files
from utils.files.records import replacing
from utils.files.regular import regular
from utils.files.torch_files import one_line
from utils.program import InputError, Unavailable, needed

# pytorch-fid's FID_WEIGHTS_URL. pytorch-fid is imported where it is used: that takes seconds.
WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
# The published weights. With any other file the numbers are not FID, KID and IS.
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0,
           (2, 0): np.lib.format.read_array_header_2_0}
MOST_DIMENSIONS = 8192  # in a file of statistics (Inception's features have 2048)
KEPT_FEATURES = 10_000  # reference features cached for KID, 82 MB at 2048 dimensions


def inception(weights=None, download=True):
    """(pytorch-fid's InceptionV3 in eval mode on the CPU, SHA-256 of its weights file).

    The file is ``weights`` if given, else the one in the torch hub cache, else (with ``download``)
    the one that pytorch-fid downloads. Unavailable if there is none, InputError if the file holds
    something else.
    """
    pytorch_fid = needed("pytorch_fid.inception")
    with distributed.first_goes_ahead():
        path = find_weights(weights, download and distributed.rank() == 0)
    try:
        state, sha256 = torch_files.read_hashed(path)
        # pytorch-fid does not accept a weights file. It fetches its weights with this function ...
        with mock.patch.object(pytorch_fid, "load_state_dict_from_url",
                               lambda *args, **kwargs: state):
            network = pytorch_fid.InceptionV3()
        # ... and drops the last layer. The Inception Score traditionally omits that layer's bias.
        network.last = nn.Parameter(state["fc.weight"], requires_grad=False)
    except (InputError, OSError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} does not hold the Inception weights of pytorch-fid: replace it "
                         f"by {WEIGHTS_URL} (--inception_weights) [{one_line(error)}]") from error
    return network.eval(), sha256


def find_weights(weights, download):
    """The path of the Inception weights, downloaded to the torch hub cache if need be."""
    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS_URL).name))
    if path.is_file():
        return path
    why = f"no file {path}" if weights else "--no-download"
    if download and not weights:
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub has no timeout
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix=WEIGHTS_SHA256)
            return path
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            why = one_line(error)
        finally:
            socket.setdefaulttimeout(before)
    raise Unavailable(f"no Inception weights: put {WEIGHTS_URL} at {path}, or name such a file "
                      f"with --inception_weights [{why}]")


@torch.no_grad()
def inception_outputs(network, images, batch_size=50):
    """(features [N, 2048], probabilities [N, 1008]), float64, of uint8 images [N, 3, H, W].

    Runs on the network's device, on images / 255 as pytorch-fid does with image files.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images are uint8 [N, 3, H, W], got {images.dtype} {images.shape}")
    def outputs(part):
        pool3 = network(part.to(network.last.device).float() / 255)[0].flatten(1)
        return pool3.double().cpu(), (pool3 @ network.last.T).double().softmax(1).cpu()

    parts = distributed.spread(outputs, images.split(batch_size), "Inception")
    features, probabilities = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return features, probabilities


def penultimate_features(model, images, batch_size=500):
    """The input of the last layer of a JEM ``model``, float64 [N, d], for uint8 [N, 3, H, W].

    Runs in eval mode and restores the mode. Used for ``fd_features``, the Frechet distance in the
    features of one of our classifiers. Values compare only for the same checkpoint's features, and
    they are not FID.
    """
    features = nn.Sequential(model.stem, model.trunk[:-1]).train(model.training)
    images = images.to(next(model.parameters()).device)
    return predict(features, images, batch_size).double().cpu().numpy()


def statistics(features):
    """(mean [d], covariance [d, d]) of features [n, d] in float64. Unavailable for n < 2."""
    if len(features) < 2:
        raise Unavailable(f"a covariance needs 2 images, there are {len(features)}")
    features = checked(features, "features")
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def rank_deficient(n, dimensions=2048):
    """Whether n images are too few for a covariance of full rank (its rank is at most n - 1).

    The Frechet distance is still defined then, but strongly biased upwards. Records must say so.
    """
    return n <= dimensions


def frechet_distance(stats_a, stats_b):
    """FID's squared distance, |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    Each argument starts with a mean [d] and a covariance [d, d]. Unavailable if their shapes differ
    or if pytorch-fid finds no real square root because they are nearly singular.
    """
    calculate_frechet_distance = needed("pytorch_fid.fid_score").calculate_frechet_distance
    try:
        with contextlib.redirect_stdout(sys.stderr):  # pytorch-fid prints remarks
            return float(calculate_frechet_distance(*stats_a[:2], *stats_b[:2]))
    except (AssertionError, ValueError) as error:
        raise Unavailable("no Frechet distance: too few images, or features of two networks "
                         f"[{one_line(error)}]") from error


def inception_score(probabilities, splits):
    """(mean, std) over ``splits`` consecutive parts of exp(E_x KL(p(y|x) || p(y))), in [1, K].

    The rows of ``probabilities`` [N, K] sum to 1 and must not be sorted by class. Unavailable for
    fewer images than splits.
    """
    n = len(probabilities)
    if not 1 <= splits <= n:
        raise Unavailable(f"the Inception Score of {n} images cannot have {splits} splits: lower "
                          "--is_splits")
    probabilities, scores = checked(probabilities, "probabilities"), []
    for k in range(splits):
        part = probabilities[k * n // splits:(k + 1) * n // splits]
        scores.append(np.exp(rel_entr(part, part.mean(0)).sum(1).mean()))  # 0 log 0 = 0
    return float(np.mean(scores)), float(np.std(scores))


def kernel_inception_distance(features_a, features_b, subsets=100, subset_size=1000, seed=0):
    """(mean, std) over random subsets of the unbiased MMD^2 with kernel (x.y / d + 1)^3.

    Features are [n, d]. Each subset is drawn anew from both sets, without replacement. The estimate
    is unbiased at any size, so it may be negative. Unavailable for fewer images than subset_size.
    """
    m, n = subset_size, min(len(features_a), len(features_b))
    if not 2 <= m <= n:
        raise Unavailable(f"KID cannot take subsets of {m} from {n} images (2 at least): lower "
                          "--kid_subset_size")
    random, values = np.random.default_rng(seed), []
    for _ in range(subsets):
        x, y = (checked(f[random.choice(len(f), m, replace=False)], "features")
                for f in (features_a, features_b))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)  # pairs i != j
        values.append(within / (m * (m - 1)) - 2 * xy.mean())
    return float(np.mean(values)), float(np.std(values))


def checked(values, name):
    """``values`` [N, d] in float64. InputError if any is NaN or infinite."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"{name} are [N, d], got shape {values.shape}")
    if not np.isfinite(values).all():
        raise InputError(f"{name} hold NaN or infinity: the network that made them is broken")
    return values


def select_per_class(probability, predicted, fraction):
    """Indices, ascending, of the most confident ``fraction``, in (0, 1], of each predicted class.

    ``probability`` [N] is p(y|x) of the predicted class, ``predicted`` [N] that class. Of n_y
    images, round(fraction n_y) are taken, but at least one. Ties go to the earlier image. FID
    depends on the selection, so records must name it.
    """
    probability, predicted = np.asarray(probability), np.asarray(predicted)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction lies in (0, 1], got {fraction}")
    if not np.isfinite(probability).all():
        raise InputError("p(y|x) holds NaN or infinity: nothing can be ranked by it")
    taken = np.zeros(len(predicted), dtype=bool)  # a mask, so that the order of images stays
    for y in np.unique(predicted):
        members = np.flatnonzero(predicted == y)
        ranked = members[np.argsort(-probability[members], kind="stable")]
        taken[ranked[:max(1, round(fraction * len(members)))]] = True
    return np.flatnonzero(taken)


class Reference(NamedTuple):
    """Statistics of ``n`` reference images for frechet_distance, and features for KID.

    ``features`` are float32 [at most KEPT_FEATURES, d], evenly spaced over the set. If only the
    statistics are known, ``n`` and ``features`` are None.
    """

    mean: np.ndarray
    covariance: np.ndarray
    n: int | None
    features: np.ndarray | None


def saved_statistics(path):
    """The ``Reference`` of a statistics file of pytorch-fid: ``mu`` [d] and ``sigma`` [d, d].

    InputError for anything else. Nothing is unpickled. Shapes are checked before data are read.
    """
    path, arrays = Path(path), {}
    try:
        with regular(path) as file, zipfile.ZipFile(file) as archive:
            for name, axes in (("mu", 1), ("sigma", 2)):
                with archive.open(f"{name}.npy") as stream:
                    read_header = HEADERS[np.lib.format.read_magic(stream)]
                    shape, _, dtype = read_header(stream)
                if len(shape) != axes or max(shape) > MOST_DIMENSIONS or dtype.kind != "f":
                    raise ValueError(f"{name} is {dtype} of shape {shape}")
                with archive.open(f"{name}.npy") as stream:
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
        mu, sigma = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
        if sigma.shape != (len(mu), len(mu)):
            raise ValueError("their shapes do not fit together")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("they are not finite")
    # NotImplementedError: a zip compressed in a way that Python does not know
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, NotImplementedError,
            zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"--reference {path} is no statistics file of pytorch-fid, which holds mu "
                         f"[d] and sigma [d, d] [{one_line(error)}]") from error
    return Reference(mu, sigma, None, None)


@contextlib.contextmanager
def cache(path):
    """Open the arrays of a cache file, which must be intact and uncompressed (as by np.savez)."""
    with regular(path) as file:
        torch_files.check_zip(file, path, path.stat().st_size)
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            yield arrays


def reference_statistics(path, compute):
    """The ``Reference`` cached at ``path`` (.npz), or else computed and written there.

    ``compute()`` returns features [n, d]. An unusable cache is replaced, with a line on stderr. The
    file name must identify the reference set and the network.
    """
    path = Path(path)
    try:
        with cache(path) as file:
            cached = Reference(file["mean"], file["covariance"], int(file["n"]), file["features"])
        d = len(cached.mean)
        if cached.covariance.shape != (d, d) or cached.features.shape[1:] != (d,):
            raise ValueError("its shapes do not fit together")
        return cached
    except FileNotFoundError:
        pass
    except (InputError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError,
            EOFError, MemoryError, zipfile.BadZipFile) as error:
        print(f"{path} is no usable cache [{one_line(error)}]: computing it again", file=sys.stderr)
    features = compute()
    kept = np.linspace(0, len(features) - 1, min(len(features), KEPT_FEATURES)).astype(np.int64)
    reference = Reference(*statistics(features), len(features), features[kept].astype(np.float32))
    try:
        if distributed.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                np.savez(file, **reference._asdict())
    except OSError as error:  # a shared data folder may be read-only
        print(f"{path} cannot be written and will be computed again [{one_line(error)}]",
              file=sys.stderr)
    distributed.barrier()  # so that next time all ranks find the file, or none
    return reference
