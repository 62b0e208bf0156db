"""What a training run starts from, built from the flags."""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import JEM
from samplers import ClassGaussians, ReplayBuffer, UniformInit
from utils import distributed
from utils.checkpoint import State, own_share, stream_key
from utils.cli import InputError
from utils.data import SPECS, TrainData, load_splits
from utils.machine import compiled
from utils.seeding import generator


def per_class(args):
    """Whether any chain is drawn for a given class."""
    return args.class_cond_p_x_sample or args.p_x_y_weight > 0


def n_parts(args):
    """How many parts of --batch_size images a step's global batch has."""
    return distributed.world() * args.accumulate


def build(args, device):
    """Everything the flags describe, fresh: (state, data, p0, valid, test), on ``device``."""
    spec = SPECS[args.dataset]
    images, valid, test = (split.to(device) for split in load_splits(
        args.dataset, args.data_root, n_valid=args.n_valid, n_train=args.n_train,
        download=args.download, size=args.image_size))
    data = TrainData(images, spec, batch_size=args.batch_size, sigma=args.sigma, seed=args.seed,
                     labelled_batch=args.labelled_batch, parts=n_parts(args),
                     shared_batch=args.shared_batch, clean_p_x=args.clean_p_x,
                     alternating_flip=args.alternating_flip)
    if args.init == "informative":
        try:
            p0 = ClassGaussians.fit(images.x, images.y, spec.n_classes,
                                    compiled=args.compile != "off")
        except ValueError as error:  # --n_train left a class out
            raise InputError(f"{error}: raise --n_train, or --init uniform") from error
    else:
        p0 = UniformInit(images.x.shape[1:], device)
    origin = {"init": args.init, "dataset": args.dataset, "n_valid": args.n_valid,
              "n_train": len(images.y), "train_sha256": images.digest()}
    return new_state(args, data, p0, origin), data, p0, valid, test


def new_state(args, data, p0, origin, stream=0):
    """Weights, optimiser and replay buffer as a run begins with them."""
    key, device = stream_key(args.seed, stream), data.device
    torch.manual_seed(args.seed + stream)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = JEM.wide_resnet(depth=args.depth, width=args.width, n_classes=data.spec.n_classes,
                            norm=args.norm, bn_momentum=args.bn_momentum)
    if args.sync_bn and distributed.world() > 1:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device, memory_format=layout).train()
    average = None
    if args.ema:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema),
                                use_buffers=True)
    for p in model.parameters():
        # Gradients are summed into memory of our own, never None: the first pass would leave there
        # what its CUDA graph returned, which later passes overwrite (pytorch/pytorch#169545).
        p.grad = torch.zeros_like(p)
    model.bf16 = args.amp == "bf16"
    compiled(model, args.compile)
    buffer = None
    if args.p_x_weight or args.p_x_y_weight:
        buffer = ReplayBuffer.fill(
            args.buffer_size, p0, data.spec.n_classes, per_class=per_class(args),
            host=generator("cpu", key, "fill", "host"),
            generator=generator(device, key, "fill", "device"))
        buffer.images = own_share(buffer.images).clone()
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9,
                                    nesterov=args.nesterov, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay)
    return State(model, optimizer, buffer, origin, average=average)
