"""Machine settings: device, precision, memory, compilation."""

import ctypes
import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from utils import distributed
from utils.program import InputError, say

# The settings of --fast by kind of device. A CPU with native bfloat16 gets --amp bf16 as well. One
# whose widest vectors are AVX2 gets nothing: compiled passes were no faster there than PyTorch's.
FAST = {"cpu": {"compile": "default"},
        "cuda": {"compile": "reduce-overhead", "amp": "bf16", "cudnn_benchmark": True}}
BF16_BOUND = 0.03  # ten times the rounding error
DRIVER = Path("/proc/driver/nvidia/version")
OFF = {"compile": "off", "amp": "off", "cudnn_benchmark": False}


def pick_device(name, num_threads):
    """The torch.device called ``name``, tested by allocating a number there.

    Under torchrun, ``cuda`` (or auto) is the GPU of this process's local rank. InputError if the
    device cannot be used.
    """
    if num_threads:
        torch.set_num_threads(num_threads)
    if name == "auto":
        name = kind(name)
        if name == "cpu" and DRIVER.exists():
            say("the CPU is used: a GPU's driver is here, but it may be too old for torch "
                f"{torch.__version__}, which cannot use it")
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise InputError(f"--device {name} is one GPU for all processes: type --device cuda")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by kind of device
        reason = str(error).splitlines()[0]
        fault = InputError(f"--device {name} cannot be used here: {reason}")
        fault.of_one_process = True  # only ranks without a GPU see this
        raise fault from error
    if device.type != "cuda":
        keep_freed_memory()
        return device
    if device.index is None:  # set_device takes no device without a number
        device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    return device


def kind(name):
    """The kind of a --device: ``cpu`` or ``cuda``, or what ``name`` begins with."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name.split(":")[0]


def about_threads(device, num_threads):
    """Advice in one line if --num_threads was not typed and the CPU is busy, else None."""
    cores = os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not on Windows
        return None
    own = num_threads == 0 and torch.get_num_threads() > 1
    if device.type != "cpu" or not own or load <= cores / 2:
        return None
    return (f"the machine is busy (load {load:.1f} on {cores} cores): --num_threads 1 for each of "
            "several runs is faster")


def keep_freed_memory(keep=True):
    """Make glibc keep the memory of freed tensors for new ones, as a GPU's allocator does.

    By default glibc maps large tensors separately or returns their memory when they are freed. The
    kernel then zeroes every new page at first touch, which takes a fifth of an iteration of small
    networks. ``keep=False`` restores the settings that glibc adapts to with tensors of many sizes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_threshold, m_mmap_max = -1, -2, -3, -4  # malloc.h
        mallopt(m_mmap_max, 0 if keep else 65536)
        mallopt(m_mmap_threshold, 32 * 2**20)  # the largest that glibc itself would choose
        mallopt(m_trim_threshold, 2**31 - 1 if keep else 64 * 2**20)
        mallopt(m_top_pad, 64 * 2**20 if keep else 128 * 2**10)


def fill_in_switches(args):
    """Set the switches that were not typed: off, or with --fast what is faster on the device."""
    fast = dict(FAST.get(kind(args.device), {})) if args.fast else {}
    if "compile" in fast and distributed.world() > 1:
        fast["compile"] = "default"  # CUDA graphs beside DistributedDataParallel are untried
    if args.fast and kind(args.device) == "cpu":
        if torch.backends.cpu.get_cpu_capability() == "AVX2":
            fast["compile"] = "off"
        if args.amp is None and native_bf16():
            fast["amp"] = "bf16" if bf16_error() < BF16_BOUND else "off"
    for name, off in OFF.items():
        if getattr(args, name) is None:
            setattr(args, name, fast.get(name, off))


def native_bf16():
    """Whether this CPU has bfloat16 instructions. Without them bfloat16 is slower than float32."""
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))


def bf16_error():
    """The relative error of a bfloat16 convolution and its gradients on this CPU, against float32.

    Rounding gives about 0.003. Some builds of oneDNN convolve wrongly. Takes a few milliseconds.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 32, 16, 16, generator=generator)
    weight = torch.randn(64, 32, 3, 3, generator=generator) / 17
    results = []
    for bf16 in (False, True):
        a, w = (t.clone(memory_format=torch.channels_last).requires_grad_() for t in (x, weight))
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = torch.nn.functional.conv2d(a, w, padding=1)
        results.append([y.detach().float(), *torch.autograd.grad(y.float().square().sum(), (a, w))])
    return max(float((ours - exact).norm() / exact.norm()) for exact, ours in zip(*results,
                                                                                  strict=True))


def check_bf16():
    """InputError if this CPU computes bfloat16 wrongly. Print a line if it is slow."""
    if not (error := bf16_error()) < BF16_BOUND:  # also true for NaN
        raise InputError(f"--amp bf16: convolutions on this CPU are wrong (relative error "
                         f"{error:.2g}, a fault known of some oneDNN versions): type --amp off")
    if not native_bf16():
        say("--amp bf16: this CPU has no bfloat16 of its own (avx512_bf16, amx_bf16 or sve_bf16): "
            "--amp off is faster")


def check_memory(n_bytes, device, what):
    """InputError if ``what`` needs more bytes than the device has. Call it before allocating."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if n_bytes > there:
        raise InputError(f"{what} would take {n_bytes / 2**30:,.0f} GiB of memory, and there are "
                         f"{there / 2**30:,.0f}")


def set_precision(*, tf32=False, deterministic=False):
    """Set whether a GPU multiplies float32 as TF32, and whether algorithms must be deterministic.

    PyTorch's own default is TF32 for convolutions.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
        torch.use_deterministic_algorithms(True)


def set_switches(args, device):
    """Apply the flags' process-wide settings. InputError if --compile finds no compiler."""
    set_precision(tf32=args.tf32, deterministic=args.deterministic)
    if args.amp == "bf16" and device.type == "cpu":
        check_bf16()
    torch.backends.cudnn.benchmark = args.cudnn_benchmark and not args.deterministic
    if args.compile != "off":
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA warnings
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
        except Exception as error:  # a missing or unknown compiler raises many types
            reason = str(error).strip().splitlines()[0][:120]
            needs = "g++ and, for a GPU, Python's headers: python3-dev"
            raise InputError(f"--compile {args.compile} needs a working compiler (Linux: {needs}) "
                             f"that is not here: install it, or --compile off [{reason}]"
                             ) from error


def compiled(model, mode):
    """Compile the calls of ``model`` in place, unless ``mode`` is off, and return it.

    The names of its weights stay the same, and so do checkpoints and evaluation (``eager``).
    """
    if mode != "off":
        settings = {"mode": mode, "fullgraph": True, "dynamic": False}
        model.compile(**settings)  # passes with weight gradients: one graph forward, one backward
        torch._dynamo.config.trace_autograd_ops = True  # sampler: both passes in one graph
        model.gradient_at = torch.compile(model.gradient_at, **settings)
    return model


def eager():
    """A context in which compiled networks run uncompiled, for batches of other shapes."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
