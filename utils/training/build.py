"""Builds the start of a training run from the flags."""

from typing import NamedTuple

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import JEM
from samplers import ClassGaussians, ReplayBuffer, UniformInit, make_init
from utils import distributed
from utils.cli import n_parts, network_config, per_class
from utils.data import Images, TrainData, labelled, load_splits, spec_of
from utils.files.checkpoint import State, own_share, stream_seed
from utils.files.records import jsonable
from utils.machine import check_memory, compiled
from utils.program import InputError
from utils.seeding import generator


class Setup(NamedTuple):
    """What a run works with. Training changes ``state`` and only reads the rest."""

    state: State
    data: TrainData
    p0: ClassGaussians | UniformInit
    valid: Images | None = None
    test: Images | None = None


def build(args, device):
    """Build a new ``Setup`` from the flags, on ``device``."""
    spec = spec_of(args.dataset)._replace(pad=args.pad, flip=args.flip)
    check_sizes(args, spec, device)
    images, valid, test = (split.to(device) for split in load_splits(
        args.dataset, args.data_root, n_valid=args.n_valid, n_train=args.n_train,
        download=args.download, size=args.image_size))
    data = TrainData(images, spec, batch_size=args.batch_size, sigma=args.sigma, seed=args.seed,
                     labelled_batch=args.labelled_batch, parts=n_parts(args),
                     shared_batch=args.shared_batch, clean_p_x=args.clean_p_x,
                     alternating_flip=args.alternating_flip,
                     labels_per_class=args.labels_per_class)
    known = labelled(images, args.labels_per_class, spec.n_classes)
    try:
        p0 = make_init(args.init, known.x, known.y, spec.n_classes,
                       compiled=args.compile != "off")
    except ValueError as error:  # a class has no training image
        raise InputError(f"{error}: raise --n_train, or --init uniform") from error
    origin = {"init": args.init, "dataset": args.dataset, "n_valid": len(valid.y),
              "n_train": len(images.y), "train_sha256": images.digest()}
    return Setup(new_state(args, data, p0, origin), data, p0, valid, test)


def check_sizes(args, spec, device):
    """InputError if the network, the replay buffer or a batch cannot fit into memory.

    The network counts with its gradients and momentum.
    """
    image = 4 * 3 * args.image_size**2
    with torch.device("meta"):  # takes no memory and no random numbers
        model = JEM.build(args.network, n_classes=spec.n_classes, **network_config(args))
    for what, n_bytes in {
            "this network, its gradients and momentum":
                3 * 4 * sum(p.numel() for p in model.parameters()),
            f"--buffer_size {args.buffer_size}": image * args.buffer_size,
            f"a batch of {args.global_batch_size} images": image * args.global_batch_size,
            f"--labelled_batch {args.labelled_batch}": image * args.labelled_batch}.items():
        check_memory(n_bytes, device, what)


def new_state(args, data, p0, origin, rollbacks=0):
    """The initial state of a run: weights, optimiser, replay buffer. Depends on ``rollbacks``."""
    torch.manual_seed(args.seed + rollbacks)
    model = new_model(args, data)
    average = None
    if args.ema:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema),
                                use_buffers=True)
    model.bf16 = args.amp == "bf16"
    compiled(model, args.compile)
    buffer = None
    if args.p_x_weight or args.p_x_y_weight:
        seed = stream_seed(args.seed, rollbacks)
        buffer = ReplayBuffer.fill(
            args.buffer_size, p0, data.spec.n_classes, per_class=per_class(args),
            host=generator("cpu", seed, "fill", "host"),
            generator=generator(data.device, seed, "fill", "device"))
        place = distributed.rank(), distributed.world(), args.buffer_size
        buffer = ReplayBuffer(own_share(buffer.images).clone(), data.spec.n_classes, place=place)
    return State(model, new_optimizer(args, model), buffer, origin, jsonable(vars(args)),
                 rollbacks=rollbacks, average=average)


def new_model(args, data):
    """The network on its device, in train mode, with allocated gradients."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = JEM.build(args.network, n_classes=data.spec.n_classes, **network_config(args))
    if args.sync_bn and distributed.world() > 1:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(data.device, memory_format=layout).train()
    for p in model.parameters():
        # Gradients must be summed into our own memory. If .grad were None, the first pass would put
        # the output of its CUDA graph there, and later passes overwrite that memory
        # (pytorch/pytorch#169545).
        p.grad = torch.zeros_like(p)
    return model


def new_optimizer(args, model):
    """SGD with momentum 0.9, or Adam."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=args.nesterov,
                               weight_decay=args.weight_decay)
    return torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay)
