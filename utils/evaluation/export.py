"""Exports generated images for other tools: PNGs in a folder, and one array of all images."""

import dataclasses
import zipfile

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from utils import distributed, plots
from utils.files import records
from utils.program import InputError, say

# Fields of a Subject that do not affect generated images.
ASIDE = {"opened", "label", "device", "data_root", "class_names", "download", "batch_size",
         "n_samples", "model", "kept"}
AT_ONCE = 100  # images of the buffer that are written together


def export(subject, out):
    """Write --n_samples generated images as IMAGES/NNNNN.png, and all of them as IMAGES.npz.

    ``arr_0`` of the .npz is uint8 [n, H, W, 3], the format of other FID tools. ``arr_1`` [n] holds
    the classes of conditional chains. Image i depends on the seed and i alone, because chains run
    in whole batches of --chain_batch. So a second call only makes missing or partial images, and a
    larger --n_samples continues from them. The folder belongs to one checkpoint and its settings.
    """
    if subject.source not in ("buffer", "scratch"):  # p0 and real images serve --eval fid
        raise InputError(f"--eval export is for generated images, not --source {subject.source}")
    n, scratch = subject.n_generated(), subject.source == "scratch"
    folder = out.folder / f"{out.stem}_images"
    subject.classes([0])  # refuse a wrong --y before claiming the folder
    claim(folder, settings(subject))
    batches = torch.arange(n).split(subject.chain_batch if scratch else AT_ONCE)
    todo = [b for b, part in enumerate(progress(batches, "checking"))
            if not all(whole(png(folder, i)) for i in part.tolist())]
    distributed.barrier()  # all ranks have checked before any writes
    run = subject.chain_runner() if scratch and todo else None
    buffer = None if scratch else subject.generated()[0]

    def images_of(b):
        if buffer is not None:
            return buffer[batches[b]]
        size = subject.chain_batch
        y = subject.classes(range(b * size, (b + 1) * size))
        return plots.to_uint8(subject.finite_chains(run(b, size, y))[-1])

    def write(b):
        part, images = batches[b], images_of(b)
        # the last part is shorter than a batch of chains
        for i, image in zip(part.tolist(), images[:len(part)], strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(png(folder, i))
        return len(part)

    made = sum(distributed.spread(write, todo, "images"))
    if distributed.rank() == 0:
        pack(folder, n, subject.classes(range(n)))
        say(f"{n} images: {made} made, {n - made} there already; {png(folder, 0)} to "
            f"{png(folder, n - 1).name}, and {folder}.npz (arr_0)")
    yield from ()


def progress(items, what):
    return tqdm(items, what, leave=False, disable=distributed.rank() > 0 or None)


def png(folder, i):
    return folder / f"{i:05d}.png"


def whole(path):
    """Whether a PNG exists with all its pixels."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return image.mode == "RGB"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def settings(subject):
    """All settings that the images depend on."""
    names = {field.name for field in dataclasses.fields(subject)} - ASIDE
    if subject.source == "buffer":
        names = {"source", "seed"}
    return records.jsonable({"checkpoint": subject.opened.sha256,
                             **{name: getattr(subject, name) for name in sorted(names)}})


def claim(folder, now):
    """Claim ``folder`` for images with the settings ``now``. InputError if it has others."""
    file = folder / "settings.json"
    try:
        there = records.read_json(file)
    except FileNotFoundError:
        there = None
    except ValueError:
        there = {}
    distributed.barrier()  # all ranks have read the file before rank 0 writes
    if there is None:
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            records.write_json(file, now)
        distributed.barrier()
    elif there != now:
        there = there if isinstance(there, dict) else {}
        changed = [f"{name} {there.get(name)} there, {now.get(name)} here"
                   for name in sorted(there.keys() | now.keys())
                   if there.get(name) != now.get(name)]
        raise InputError(f"{folder} holds images of other settings ({'; '.join(changed)}): remove "
                         "it, or name another folder with --results")


def pack(folder, n, classes):
    """Write FOLDER.npz from the first ``n`` images, with one image in memory at a time."""
    with Image.open(png(folder, 0)) as first:
        shape = (n, first.height, first.width, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (records.replacing(folder.with_name(f"{folder.name}.npz")) as file,
          zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive):
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for i in progress(range(n), "packing"):
                with Image.open(png(folder, i)) as image:
                    stream.write(np.asarray(image).tobytes())
        if classes is not None:
            with archive.open("arr_1.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, classes.numpy())
