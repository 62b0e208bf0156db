"""Evaluations of generated images, and pictures of them.

They are listed in evaluations.py. ``Subject.generated`` takes images from the replay buffer or
draws fresh chains.
"""

import functools
import hashlib
from pathlib import Path

import torch

from samplers import evenly_spaced, to_pixels
from utils import image_folder, plots
from utils.data import load
from utils.evaluation import generation
from utils.evaluation.inference import pixels, predict
from utils.evaluation.subject import MADE, Number, skip
from utils.files.checkpoint import open_any, sha256_of
from utils.own_images import is_own, path_of
from utils.program import InputError, Unavailable
from utils.seeding import seed_step


def selected(subject, x, protocol, top):
    """The most confident --top of the images per predicted class, and the protocol that says so."""
    if top == 1:
        return x, {**protocol, "selection": "all"}
    p = predict(subject.model, x.to(subject.device), subject.batch_size).double().softmax(1).cpu()
    keep = generation.select_per_class(p.amax(1).numpy(), p.argmax(1).numpy(), top)
    return x[torch.from_numpy(keep)], {**protocol, "selection": f"top {top} per class"}


def fid(subject, out, *, features, inception_weights, top, reference, is_splits, kid_subsets,
        kid_subset_size, sigma):
    """IS, FID and KID with pytorch-fid's Inception, fd_features with the network of --features.

    Noise of --sigma goes to real images (--source train, test or an out set) alone.
    """
    # report whatever is missing before spending hours on chains
    subject.n_generated()
    subject.classes([0])
    about = about_reference(reference)
    judge = open_any(features) if features else None
    inception = None
    try:
        inception = generation.inception(inception_weights, subject.download)
    except Unavailable as error:
        if judge is None:
            raise
        skip("IS, FID, KID", error)
    x, protocol = subject.generated()
    if sigma and subject.source not in MADE:
        noisy = (pixels(x, k, k + 1000, sigma, subject.seed) for k in range(0, len(x), 1000))
        x, protocol = torch.cat([*map(plots.to_uint8, noisy)]), {**protocol, "sigma": sigma}
    files = (out.npz("fid_images", images=x[:2000].numpy()),)
    x, protocol = selected(subject, x, {**protocol, **about}, top)
    metrics = {}
    if inception:
        metrics |= inception_metrics(subject, x, reference, protocol, *inception, is_splits,
                                     kid_subsets, kid_subset_size)
    if judge:
        metrics["fd_features"] = feature_distance(subject, x, reference, protocol, judge)
    for number in each_on_its_own(metrics):
        yield number._replace(files=files)


def each_on_its_own(metrics):
    """The numbers of {name: generator}. An unavailable one is reported and skipped."""
    had = False
    for name, numbers in metrics.items():
        try:
            yield from numbers
            had = True
        except Unavailable as error:
            skip(name, error)
    if not had:
        raise Unavailable(f"none of {', '.join(metrics)} is available")


def about_reference(reference):
    """The record's entries for --reference: train+test, a folder's name, or a file and its hash."""
    if reference.startswith("folder:"):
        path = path_of(reference)
        if not path.is_dir():
            raise InputError(f"--reference {reference} is no folder")
        return {"reference": f"folder:{path.resolve().name}"}
    if reference.endswith(".npz"):
        generation.saved_statistics(reference)  # refuse a bad file before running chains
        return {"reference": Path(reference).name, "reference_sha256": sha256_of(reference)}
    return {"reference": reference}


def counted(real):
    """The record's entry for the number of reference images, if it is known."""
    return {} if real.n is None else {"n_reference": real.n}


def reference_statistics(subject, reference, network, features_of):
    """Statistics of all real images of --reference, cached beside the data.

    ``features_of(images)`` returns features [n, d]. ``network`` is a hash that identifies it.
    --n_train has no effect here. A file of statistics is used as it is.
    """
    if reference.endswith(".npz"):
        return generation.saved_statistics(reference)

    @functools.cache
    def images():
        if reference.startswith("folder:"):
            return image_folder.read(path_of(reference), subject.image_size)[0]
        return torch.cat([load(subject.dataset, subject.data_root, train=part == "train",
                               download=subject.download, size=subject.image_size).x
                          for part in reference.split("+")])

    name = f"{subject.dataset}{subject.image_size}-{reference}"
    if is_own(subject.dataset) or reference.startswith("folder:"):  # its images may change
        name = f"own-{hashlib.sha256(images().numpy()).hexdigest()[:16]}-"
        name += reference.partition(":")[0]
    return generation.reference_statistics(
        Path(subject.data_root) / "jempp-reference" / f"{name}-{network[:16]}.npz",
        lambda: features_of(images()))


def inception_metrics(subject, x, reference, protocol, network, sha256, is_splits, subsets,
                      subset_size):
    """{name: generator of numbers} for images ``x``, computed with Inception."""
    n, network = len(x), network.to(subject.device)
    protocol = {**protocol, "tool": "pytorch-fid", "inception_sha256": sha256,
                "published_weights": sha256 == generation.WEIGHTS_SHA256,
                "rank_deficient": generation.rank_deficient(n)}

    @functools.cache
    def outputs():
        return generation.inception_outputs(network, x, subject.batch_size)

    @functools.cache
    def real():
        return reference_statistics(
            subject, reference, sha256, lambda images: generation.inception_outputs(
                network, images, subject.batch_size)[0])

    def score():
        mean, std = generation.inception_score(outputs()[1], is_splits)
        yield Number("is_mean", mean, "", n, {**protocol, "splits": is_splits})
        yield Number("is_std", std, "", n, {**protocol, "splits": is_splits})

    def distance():
        value = generation.frechet_distance(generation.statistics(outputs()[0]), real())
        yield Number("fid", value, "", n, {**protocol, **counted(real())})

    def kernel_distance():
        if real().features is None:
            raise Unavailable(f"{protocol['reference']} holds the statistics of its images alone, "
                              "KID needs features of each")
        mean, std = generation.kernel_inception_distance(
            outputs()[0], real().features, subsets, subset_size, subject.seed)
        yield Number("kid", mean, "", n, {**protocol, "n_reference": len(real().features),
                                          "subsets": subsets,
                                          "std": std, "subset_size": subset_size})

    return {"IS": score(), "FID": distance(), "KID": kernel_distance()}


def feature_distance(subject, x, reference, protocol, judge):
    """The Frechet distance in the features of ``judge``, a checkpoint."""
    model, n = judge.model.to(subject.device), len(x)

    def features_of(images):
        return generation.penultimate_features(model, images, subject.batch_size)

    if reference.endswith(".npz"):
        raise Unavailable(f"{protocol['reference']} holds Inception's statistics, not those of "
                          "--features")
    # the same weights may be read as those of another network, if their file says nothing of it
    network = hashlib.sha256(f"{judge.sha256} {judge.model.config}".encode()).hexdigest()
    reference = reference_statistics(subject, reference, network, features_of)
    features = features_of(x)
    distance = generation.frechet_distance(generation.statistics(features), reference)
    yield Number("fd_features", distance, "", n, {
        **protocol, "features_sha256": judge.sha256, "n_reference": reference.n,
        "dimensions": features.shape[1],
        "rank_deficient": generation.rank_deficient(n, features.shape[1])})


def class_names(subject):
    """Names for rows of pictures."""
    n_classes, names = subject.model.config["n_classes"], subject.class_names
    return names if len(names) == n_classes else [str(k) for k in range(n_classes)]


def by_class(subject, x):
    """Predicted class and log p(y|x), log p(x) + log Z of images [n, 3, H, W] in [-1, 1]."""
    logits = predict(subject.model, plots.to_uint8(x).to(subject.device), subject.batch_size)
    logits = subject.finite(logits).double().cpu()
    return logits.argmax(1), logits.log_softmax(1).amax(1), logits.logsumexp(1)


def samples(subject, out):
    """Grids of samples (Figs 3, 4, 12), chains over time, and p_0 (Figs 2, 7, 8). Pictures only."""
    if subject.opened.buffer is not None:
        draw_buffer(subject, out)
    try:
        if subject.init == "informative":
            draw_p0(subject, out)
        draw_chains(subject, out)
    except Unavailable as error:
        skip("samples from scratch", error)
    yield from ()


def draw_buffer(subject, out):
    """The replay buffer: evenly spaced slots, and the first ten of each predicted class."""
    x, names = subject.buffer(), class_names(subject)
    shown = x[evenly_spaced(len(x), 100)].split(10)
    out.figure("buffer", plots.image_rows(shown, [""] * len(shown), subject.title(
        "Replay buffer, evenly spaced slots", len(x))))
    predicted, _, _ = by_class(subject, x)
    out.figure("buffer_by_class", plots.image_rows(
        [x[predicted == k][:10] for k in range(len(names))], names,
        subject.title("Replay buffer by predicted class, unselected", len(x)), 10))


def draw_p0(subject, out):
    """The centre of each class and nine draws from its Gaussian."""
    names, centres = class_names(subject), subject.p0.means()
    y = torch.arange(len(names)).repeat_interleave(9)
    streams = seed_step(subject.seed, 0, "p0", subject.device)
    draws = subject.p0.sample(len(y), y, host=streams.host, generator=streams.device)
    rows = [torch.cat([c[None], d]) for c, d in zip(centres, draws.split(9), strict=True)]
    out.figure("p0", plots.image_rows(
        rows, names, subject.title("Class centres (left) and draws of p0", len(y))))


def draw_chains(subject, out):
    """Fresh chains, unconditional and per class: their last images, and ten chains over time."""
    words, names = f"{subject.sampler} from scratch", class_names(subject)
    free = subject.chains(subject.chain_batch, snapshots=10)
    rows = free[-1][:100].split(10)
    out.figure("scratch", plots.image_rows(
        rows, [""] * len(rows), subject.title(words, sum(map(len, rows)))))
    marks = [f"{round(k * subject.chain_steps / 10)}" for k in range(11)]
    out.figure("chains", plots.image_rows([x[:10] for x in free], marks, subject.title(
        "Chains from p0: one a column, outer step at the left", min(10, subject.chain_batch))))
    y = torch.arange(len(names)).repeat_interleave(10)
    conditional = subject.chains(len(y), y)[-1]
    out.figure("scratch_by_class", plots.image_rows(
        conditional.split(10), names, subject.title(f"Conditional, {words}", len(y))))
    out.npz("samples", scratch=plots.to_uint8(free[-1]).numpy(),
            by_class=plots.to_uint8(conditional).numpy(), y=y.numpy())


def best_worst(subject, out):
    """Per predicted class, the images with highest and lowest log p(x) and p(y|x) (Figs 13-22)."""
    x, names = to_pixels(subject.generated()[0]), class_names(subject)
    predicted, log_p_y, log_p_x = by_class(subject, x)
    for name, words, score in (("p_x", "p(x)", log_p_x), ("p_y", "p(y|x)", log_p_y)):
        for end, descending in (("best", True), ("worst", False)):
            rows = []
            for k in range(len(names)):
                members = (predicted == k).nonzero().squeeze(1)
                order = score[members].argsort(descending=descending, stable=True)
                rows.append(x[members[order[:10]]])
            title = f"{'Highest' if descending else 'Lowest'} {words} by predicted class"
            out.figure(f"{end}_{name}", plots.image_rows(
                rows, names, subject.title(title, len(x)), 10))
    out.npz("best_worst", predicted=predicted.numpy(), log_p_x=log_p_x.numpy(),
            log_p_y=log_p_y.numpy())
    yield from ()
