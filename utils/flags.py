"""The flags: one spelling each, in groups that programs share.

The defaults are the paper's main run: CIFAR-10, WRN-28-10, PYLD-10-5. Names are the released
code's. The paper's symbols are the metavars. utils/cli.py resolves flags that depend on each other.
"""

import argparse
import math
import os

from models import NETWORKS, NORMS
from utils.program import path

LARGEST, SMALLEST = 2.0**128 - 2.0**104, 2.0**-126  # of float32's normal numbers


def number(kind, low=None, high=None, *, above=None, finite=True):
    """An argparse type: a number of type ``kind`` in [low, high] or (above, high].

    Infinity is allowed only if ``finite`` is False, NaN never. The default bounds are those of
    64-bit integers and of float32.
    """
    largest = 2**63 - 1 if kind is int else LARGEST
    low, high = -largest if low is None else low, largest if high is None else high
    opening = f"[{low:.4g}" if above is None else f"({above:.4g}"
    bounds = f"{opening}, {f'{high:.4g}' if kind is float else high}]"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if value == math.inf and not finite:
            return value
        if finite and kind is float and math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if not low <= value <= high or (above is not None and value <= above):
            raise argparse.ArgumentTypeError(f"{text} is not in {bounds}")
        if kind is float and 0 < abs(value) < SMALLEST:
            raise argparse.ArgumentTypeError(f"{text} is too small for float32: type 0 instead?")
        return value

    return parse


# Counts, which only cost time, and seeds. Then sizes, which machine.check_memory bounds further.
POSITIVE, NATURAL = number(int, 1), number(int, 0)
SIZE, SIZE_OR_NONE, AT_LEAST_2 = number(int, 1, 10**7), number(int, 0, 10**7), number(int, 2, 10**6)
# Weights, steps and rates. A product of any three fits float32.
WEIGHT, STEP, RATE = number(float, 0, 1e12), number(float, high=1e12, above=0), number(float, 0, 1)
FACTOR = number(float, high=1, above=0)
THREADS = number(int, 0, max(64, 4 * (os.cpu_count() or 1)))
FLAG = argparse.BooleanOptionalAction


def run_dir(text):
    """An argparse type: a path that TensorBoard can write to."""
    try:
        path(text).encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text} is not UTF-8: choose another name") from None
    return path(text)


def label(text):
    """An argparse type: text for pictures and records. Bytes that are not UTF-8 become �."""
    return os.fsencode(text).decode(errors="replace")


def images(text):
    """An argparse type: the name of a data set. Expands ~ after ``folder:`` and ``npz:``."""
    kind, colon, rest = text.partition(":")
    return f"{kind}:{path(rest)}" if colon and kind in ("folder", "npz") else text


def reference(text):
    """An argparse type: real images to compare with (--reference)."""
    if text in ("train", "train+test", "test") or text.startswith("folder:"):
        return images(text)
    if text.endswith(".npz"):
        return path(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of train, train+test, test, folder:PATH "
                                     "and FILE.npz")


def group(p, title, typed_only=False):
    """Make a function that adds flags to a new group of ``p``.

    With ``typed_only`` the flags have no defaults and are absent from the result unless typed.
    """
    add = p.add_argument_group(title).add_argument

    def flag(*names, **settings):
        return add(*names, **settings | {"default": argparse.SUPPRESS} if typed_only else settings)

    return flag


def add_data(p, typed_only=False):
    flag = group(p, "data", typed_only)
    flag("--dataset", type=images, default="cifar10", metavar="NAME",
         help="cifar10, cifar100, svhn, mnist, fashion_mnist, stl10 or digits, or your own images: "
              "folder:PATH, with train/CLASS/* and test/CLASS/* (and val/), or CLASS/*; npz:FILE, "
              "with x_train, y_train, x_test, y_test")
    flag("--data_root", type=path, default="data", metavar="DIR", help="folder of the data sets")
    flag("--download", action=FLAG, default=True, help="fetch what is missing")
    flag("--n_valid", type=SIZE_OR_NONE, default=None, metavar="n",
         help="validation images taken from the training split (5000; stl10 500, digits 137, "
              "own images: val/, or a tenth)")
    flag("--n_train", type=SIZE, default=None, metavar="n",
         help="use the first n training images only (small-scale studies)")
    flag("--labels_per_class", type=NATURAL, default=0, metavar="n",
         help="labels for n training images of each class, log p(x) on all; 0: all labels")
    flag("--image_size", type=number(int, 16, 256), default=None, metavar="S",
         help="side of the images: digits 16 or 32, stl10 32 or 96, own images a multiple of 4 up "
              "to 256 (digits 16, else 32)")
    flag("--pad", type=number(int, 0, 255), default=None, metavar="n",
         help="pixels by which training images are shifted at random (4; digits 2, own images and "
              "stl10 an eighth of the side)")
    flag("--flip", action=FLAG, default=None,
         help="mirror training images at random (on for cifar10, cifar100, fashion_mnist and "
              "stl10, off for the others and own images, which may show letters or digits)")


def add_model(p, typed_only=False):
    flag = group(p, "network", typed_only)
    flag("--network", choices=tuple(NETWORKS), default="wrn",
         help="wrn: the Wide-ResNet of the paper; resnet18: torchvision's, with a 3x3 stem")
    # the network's arguments; cli.resolve_network fills in its defaults
    flag("--depth", type=number(int, 1, 1000), default=None, metavar="6n+4",
         help="layers (wrn 28)")
    flag("--width", type=number(int, 1, 100), default=None, metavar="k",
         help="widening factor (wrn 10)")
    flag("--norm", choices=NORMS, default=None, help="normalisation (wrn batch)")
    flag("--bn_momentum", type=FACTOR, default=None,
         help="PyTorch's sense: running = (1-m) old + m batch (wrn 0.9, as released)")
    flag("--stride_first", action=FLAG, default=None,
         help="put the stride in a block's first convolution, as in the original Wide-ResNet "
              "(wrn off: in its second, as released)")
    flag("--stem_stride", type=int, choices=(1, 2), default=None,
         help="2: a 4x4 stem of stride 2, so that all that follows costs a quarter (wrn 1)")


def add_sampler(p, typed_only=False):
    flag = group(p, "sampler (Algorithm 1)", typed_only)
    flag("--n_steps", type=POSITIVE, default=10, metavar="M",
         help="outer steps, each a forward and backward pass")
    flag("--in_steps", type=NATURAL, default=5, metavar="N",
         help="inner steps; 0 is SGLD with --sgld_lr")
    flag("--pyld_lr", type=STEP, default=0.2, metavar="α",
         help="step of one inner turn (the paper's α/2 · clamp, see Differences)")
    flag("--sgld_lr", type=WEIGHT, default=0.0, metavar="α",
         help="step of SGLD where --in_steps is 0 (JEM: 1)")
    flag("--sgld_std", type=WEIGHT, default=0.0, metavar="σ",
         help="std of the noise after each outer step (JEM: 0.01)")
    flag("--eps", type=number(float, above=0, finite=False), default=1.0, metavar="ε",
         help="proximity: bound on each gradient component; inf switches it off")
    flag("--step_decay", type=FACTOR, default=1.0, metavar="γ",
         help="outer step i is γ^i times as long as the first")
    flag("--pixel_clamp", action=FLAG, default=True,
         help="keep chains in [-1, 1] after every inner step")
    flag("--literal_pyld", action=FLAG, default=False,
         help="run the inner loop of Algorithm 1 step by step (slower; the same "
              "for an affine stem)")
    flag("--sample_mode", choices=("train", "eval"), default="train",
         help="the network's mode while sampling (JEM: eval)")
    flag("--init", choices=("informative", "uniform"), default="informative",
         help="p_0: class Gaussians (Eq. 14) or uniform noise (JEM)")
    flag("--buffer_size", type=SIZE, default=10000, metavar="|B|",
         help="images in the replay buffer")
    flag("--reinit_freq", type=RATE, default=0.05, metavar="ρ",
         help="probability that a chain starts anew from p_0")
    flag("--class_cond_p_x_sample", action=FLAG, default=False,
         help="draw the chains of p(x) per class, y uniform")


def add_train(p, typed_only=False):
    flag = group(p, "objective (Eq. 5)", typed_only)
    flag("--p_x_weight", type=WEIGHT, default=1.0, help="weight of log p(x)")
    flag("--p_x_from", type=NATURAL, default=0, metavar="EPOCH",
         help="begin log p(x) after this many epochs; no chains run before")
    flag("--p_x_ramp", type=NATURAL, default=0, metavar="STEPS",
         help="raise its weight linearly over this many steps")
    flag("--p_y_given_x_weight", type=WEIGHT, default=1.0, help="weight of log p(y|x)")
    flag("--p_x_y_weight", type=WEIGHT, default=0.0, help="weight of log p(x, y)")
    flag("--shared_batch", action=FLAG, default=False,
         help="one real batch for p(x) and p(y|x) (Algorithm 2); released: two")
    flag("--sigma", type=WEIGHT, default=0.03, metavar="σ",
         help="std of the noise on training images")
    flag("--clean_p_x", action=FLAG, default=False,
         help="no crop, flip or noise on the real batch of p(x) (SADA-JEM)")
    flag("--energy_l2", type=WEIGHT, default=0.0, metavar="λ",
         help="add λ (E(x+)² + E(x-)²) to the loss of log p(x), which keeps energies small")
    flag("--label_smoothing", type=RATE, default=0.0, help="label smoothing of the cross-entropy")
    flag("--alternating_flip", action=FLAG, default=False,
         help="mirror each image every other epoch instead of at random")
    flag("--adversarial", choices=("none", "linf", "l2"), default="none",
         help="PGD adversarial training of p(y|x) in this ball (a baseline of Fig. 9)")
    flag("--adv_eps", type=STEP, default=None, metavar="ε",
         help="radius of --adversarial: L-inf in 1/255 (8), L2 in [0, 1] images (0.5)")
    flag("--adv_steps", type=POSITIVE, default=7, help="PGD steps of --adversarial")
    flag = group(p, "optimiser", typed_only)
    flag("--optimizer", choices=("sgd", "adam"), default="sgd",
         help="SGD with momentum 0.9, or Adam with betas 0.9 and 0.999")
    flag("--nesterov", action=FLAG, default=False, help="Nesterov momentum (SGD)")
    flag("--lr", type=STEP, default=None,
         help="learning rate (sgd 0.1, adam 0.0001)")
    flag("--weight_decay", type=WEIGHT, default=4e-4, help="L2, all weights")
    flag("--schedule", choices=("steps", "cosine", "linear"), default="steps",
         help="the learning rate after the warm-up: in steps at --decay_epochs, or down to 0 at "
              "the end of --n_epochs (linear: a one-cycle schedule)")
    flag("--warmup_iters", type=NATURAL, default=1000, help="steps of linear warm-up")
    flag("--decay_epochs", type=NATURAL, nargs="*", default=[50, 100, 125],
         help="epochs at which the learning rate is multiplied by --decay_rate")
    flag("--decay_rate", type=STEP, default=0.2, help="factor at each of --decay_epochs")
    flag("--batch_size", type=SIZE, default=None, metavar="B",
         help="images per pass, real or sampled (64)")
    flag("--labelled_batch", type=SIZE, default=None, metavar="B",
         help="images in the batch of p(y|x) (--batch_size)")
    flag("--accumulate", type=SIZE, default=1, metavar="k",
         help="parts of B images whose gradients are averaged in one step")
    flag("--global_batch_size", type=SIZE, default=None,
         help="images per step over all processes and parts; sets --batch_size")
    flag("--lr_scaling", choices=("none", "sqrt", "linear"), default="none",
         help="multiply --lr by (global batch / 64), or its root")
    flag("--sync_bn", action=FLAG, default=False,
         help="batch statistics over the images of all processes (off: each process its own)")
    flag("--sam", type=WEIGHT, default=0.0, metavar="ρ",
         help="sharpness-aware minimisation with this radius (SADA-JEM); 0 is off")
    flag("--sam_adaptive", action=FLAG, default=False,
         help="scale --sam's radius by the size of each weight (ASAM; SADA-JEM as released)")
    flag("--ema", type=number(float, 0, 0.999999), default=0.0, metavar="DECAY",
         help="evaluate a running average of the weights and save it in best.pt; 0 is off")
    flag("--recalibrate_bn", type=NATURAL, default=0, metavar="n",
         help="evaluate with running statistics over n training images; 0 is off")
    flag("--bn_update", choices=("all", "real"), default="all",
         help="passes that update the running statistics of batch norm; real: not those of "
              "sampled images (batch statistics are used all the same)")
    flag("--n_epochs", type=POSITIVE, default=150, help="epochs of labelled images")
    flag = group(p, "start", typed_only)
    flag("--load_path", type=path, default=None, metavar="FILE",
         help="start from the weights of a checkpoint of this network: ours, released or published")
    flag("--load_head", action=FLAG, default=True,
         help="load its last layer too; --no-load_head for other classes")
    flag("--load_buffer", action=FLAG, default=False, help="load its replay buffer too")
    flag = group(p, "run", typed_only)
    flag("--run_dir", type=run_dir, default="runs/jempp", metavar="RUN",
         help="all output goes here")
    flag("--seed", type=NATURAL, default=1, help="seed of weights, data order and chains")
    flag("--max_steps", type=POSITIVE, default=None, help="stop after this step")
    flag("--max_minutes", type=STEP, default=None,
         help="save and stop after this many minutes (exit code 75)")
    flag("--ckpt_steps", type=POSITIVE, default=None, metavar="K",
         help="save last.pt every K steps besides every epoch")
    flag("--print_every", type=POSITIVE, default=100, help="steps between records")
    flag("--eval_every", type=POSITIVE, default=1, help="epochs between evaluations")
    flag("--on_divergence", choices=("rollback", "stop"), default="rollback",
         help="go back to the last good checkpoint with other random numbers, or stop")
    flag("--max_rollbacks", type=NATURAL, default=3,
         help="stop with exit code 3 at the next divergence after this many rollbacks")
    flag("--rollback_lr_factor", type=FACTOR, default=1.0,
         help="multiply the learning rate by this at each rollback")
    flag("--max_loss", type=number(float, above=0, finite=False), default=1e8,
         help="a larger |loss| counts as divergence (released: 1e8); inf is off")
    flag("--max_gap", type=number(float, above=0, finite=False), default=50.0,
         help="a larger |E(x+) - E(x-)| counts as divergence (healthy runs stay below 6); inf is "
              "off")
    flag("--max_saturated", type=RATE, default=0.995, metavar="FRACTION",
         help="a larger fraction of the chains' pixels at their bounds counts as divergence "
              "(flat colours are not images); 1 is off")
    flag("--min_accuracy_ratio", type=RATE, default=0.5, metavar="FRACTION",
         help="training accuracy below this fraction of its best so far counts as divergence; "
              "0 is off")
    flag("--good_after", type=NATURAL, default=100, metavar="STEPS",
         help="a rollback goes to a checkpoint that the run survived for this long")
    flag("--check_every", type=POSITIVE, default=10, metavar="STEPS",
         help="on a GPU, steps between checks for divergence (CPU: every step)")
    flag("--dist_timeout", type=number(float, high=1e6, above=0), default=10.0, metavar="MINUTES",
         help="under torchrun: end the job if a process is silent for this long")
    flag("--keep_every", type=POSITIVE, default=None, metavar="K",
         help="also keep epoch_NNNN.pt every K epochs, to evaluate (Fig. 6)")
    flag("--dry_run", action="store_true", help="print the resolved options and stop")


def add_speed(p, typed_only=False):
    flag = group(p, "speed", typed_only)
    flag("--fast", action=FLAG, default=False,
         help="turn on what makes training faster: on a CPU --compile default if it has more than "
              "AVX2, and --amp bf16 if it has that; on a GPU --compile reduce-overhead --amp bf16 "
              "--cudnn_benchmark")
    flag("--compile", choices=("off", "default", "reduce-overhead", "max-autotune"),
         default=None, help="torch.compile of the network's passes, by mode; the first "
         "steps take a minute; reduce-overhead and max-autotune use CUDA graphs (off)")
    flag("--amp", choices=("off", "bf16"), default=None,
         help="bfloat16 autocast inside the network; the rest stays float32 (off)")
    flag("--tf32", action=FLAG, default=False,
         help="let a GPU round float32 products to 10 bits")
    flag("--cudnn_benchmark", action=FLAG, default=None,
         help="let cuDNN choose its algorithms by trial (off)")


def add_device(p, typed_only=False):
    flag = group(p, "machine", typed_only)
    flag("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto: cuda if there)")
    flag("--num_threads", type=THREADS, default=0, help="CPU threads, 0 = all cores")
    flag("--deterministic", action=FLAG, default=False,
         help="on a GPU, the same bits for the same seed (always so on a CPU); slower")
    flag("--channels_last", action=FLAG, default=True,
         help="memory layout of images and weights; changes rounding only")


def add_evaluation(p, evaluations):
    """The flags that only eval_jempp.py has. ``evaluations`` are the names for --eval."""
    flag = group(p, "what")
    flag("--load_path", type=path, nargs="+", required=True, metavar="FILE", help="checkpoints")
    flag("--eval", nargs="+", required=True, choices=evaluations, metavar="NAME",
         help=", ".join(evaluations))
    flag("--results", type=path, default=None, metavar="OUT.jsonl",
         help="append records here (eval/results.jsonl beside the first checkpoint)")
    flag("--labels", type=label, nargs="+", default=None,
         help="names of the checkpoints in pictures")
    flag("--method", type=label, default=None, help="method in the records (from the arguments)")
    flag = group(p, "protocol")
    flag("--n_images", type=SIZE, default=None, metavar="n",
         help="use the first n images of each real set, or all if it has fewer (all)")
    flag("--splits", nargs="+", choices=("train", "valid", "test"),
         default=["train", "valid", "test"], help="splits for --eval accuracy")
    flag("--sigma", type=WEIGHT, default=0.0, metavar="σ",
         help="noise on real images, in and out sets (the released evaluation adds 0.03, the "
              "tables have none); not with robustness, because noise leaves the image box")
    flag("--recalibrate_bn", type=NATURAL, default=0, metavar="n",
         help="measure batch norm's running statistics anew over the first n training images; "
              "0: as the checkpoint has them")
    flag("--bins", type=number(int, 1, 1000), default=20, help="bins of the ECE (Eq. 16)")
    flag("--ood", type=images, nargs="+", metavar="NAME",
         default=["svhn", "interp", "cifar10", "cifar100", "celeba", "uniform",
                  "constant"], help="out sets; folder:PATH or npz:FILE for your own images, "
                                   "svhn=folder:PATH to give them the name of a known set")
    flag("--attacks", nargs="+", choices=("pgd", "margin", "autoattack"),
         default=["pgd", "margin"], help="attacks for --eval robustness")
    flag("--eps_linf", nargs="*", type=number(float, 0, 255), metavar="ε·255",
         default=[2, 4, 8, 16, 30], help="L-inf budgets")
    flag("--eps_l2", nargs="*", type=WEIGHT, metavar="ε",
         default=[0.25, 0.5, 1, 2], help="L2 budgets in [0, 1] images")
    flag("--attack_steps", type=POSITIVE, default=40, help="steps of PGD and margin")
    flag("--attack_restarts", type=POSITIVE, default=5, help="restarts of margin")
    flag("--n_attack", type=NATURAL, default=300, metavar="n",
         help="attack the first n test images, or all if there are fewer; 0: all")
    flag = group(p, "generated images")
    flag("--source", type=images, default="buffer", metavar="SET",
         help="evaluate the replay buffer (buffer), fresh chains (scratch), or for a scale p0, the "
              "real images of train or test, or an out set of --ood")
    flag("--n_samples", type=SIZE, default=None, metavar="n",
         help="number of images (all that there are; scratch and p0: 1000)")
    flag("--chain_steps", type=POSITIVE, default=1000, metavar="M",
         help="outer steps of chains from scratch")
    flag("--chain_batch", type=AT_LEAST_2, default=100,
         help="chains that share their batch statistics")
    flag("--company", type=SIZE_OR_NONE, default=0, metavar="n",
         help="images of the buffer that share each batch of fresh chains, as in training, where a "
              "batch of 64 has three fresh ones")
    flag("--top", type=FACTOR, default=1.0,
         help="keep this fraction of each predicted class, by p(y|x), before FID")
    flag("--conditional", action=FLAG, default=False,
         help="fresh chains per class, all classes in turn")
    flag("--y", nargs="+", default=None, metavar="CLASS",
         help="fresh chains of these classes in turn, by name or number")
    flag("--reference", type=reference, default="train+test", metavar="SET",
         help="real images of FID: train, test or train+test (the paper's) of --dataset, "
              "folder:PATH, or FILE.npz with mu and sigma, as pytorch-fid saves them")
    flag("--is_splits", type=number(int, 1, 10**6), default=10, help="splits for Inception Score")
    flag("--kid_subsets", type=number(int, 1, 10**6), default=100)
    flag("--kid_subset_size", type=AT_LEAST_2, default=1000)
    flag("--inception_weights", type=path, default=None, metavar="FILE",
         help="pt_inception-2015-12-05-6726825d.pth (torch hub's cache or download)")
    flag("--features", type=path, default=None, metavar="FILE",
         help="a checkpoint whose penultimate features are used for fd_features")
    flag = group(p, "run")
    flag("--batch_size", type=SIZE, default=500, help="images per pass")
    flag("--seed", type=NATURAL, default=0, help="seed of noise, chains and attacks")
    flag("--dry_run", action="store_true", help="print the resolved options and stop")
