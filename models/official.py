"""Read checkpoints of others: the released files of JEM, JEM++ and SADA-JEM, and bare weights.

Released files hold ``{"model_state_dict": ..., "replay_buffer": [n, 3, H, W]}`` or a bare state
dict, in PyTorch's zip or pre-1.6 format. Depth, width, norm and class count follow from the shapes.
JEM++ files repeat tensors (``f.layer_one``, ``f.other_layers``). JEM files have an unused
``f.linear``. Both have an ``energy_output`` head that the classifier's energy does not use. Weights
under our own names are read too, as those of a network with the default strides. Prefixes of
DataParallel, torch.compile and averaging are dropped. Anything else is a ValueError.
"""

import re

import torch

from models.jem import JEM

WRAPPERS = ("model_state_dict", "state_dict", "model")  # keys under which weights are saved
PREFIXES = {"module", "_orig_mod"}  # of DataParallel and AveragedModel, and of torch.compile
REPEATED_OR_UNUSED = re.compile(r"f\.layer_one\.|f\.other_layers\.|f\.linear\.|energy_output\.|"
                                r"n_averaged$")  # n_averaged is AveragedModel's count
RENAMED = (  # (pattern, ours), after the prefixes are dropped
    (re.compile(r"f\.conv1\."), "stem."),
    (re.compile(r"f\.(layer\d\.\d+)\.bn([12])\."), r"trunk.\1.norm\2."),
    (re.compile(r"f\.(layer\d\.\d+)\.conv([12])\."), r"trunk.\1.conv\2."),
    (re.compile(r"f\.(layer\d\.\d+)\.shortcut\.0\."), r"trunk.\1.shortcut."),
    (re.compile(r"f\.bn1\."), "trunk.norm."),
    (re.compile(r"class_output\."), "trunk.head."),
    (re.compile(r"(stem|trunk)\."), r"\1."),
)


def is_official(content):
    """Whether a loaded file looks like one of these, judged by its keys."""
    state = state_dict_of(content)
    return state is not None and any(bare(k).startswith(("f.", "stem.", "trunk.")) for k in state)


def under_our_names(content):
    """Whether a file that ``is_official`` has our names, which other strides may have, too."""
    return any(bare(k).startswith("trunk.") for k in state_dict_of(content))


def state_dict_of(content):
    """The dictionary of tensors in ``content``, without its wrappers, or None."""
    while isinstance(content, dict) and (inside := [k for k in WRAPPERS if k in content]):
        content = content[inside[0]]
    if not isinstance(content, dict) or not content:
        return None
    good = all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items())
    return content if good else None


def bare(key):
    """A tensor's name without prefixes, which may be anywhere in it."""
    return ".".join(part for part in key.split(".") if part not in PREFIXES)


def our_name(key):
    """Our name for a released tensor, or None if it is repeated or unused."""
    key = bare(key)
    if REPEATED_OR_UNUSED.match(key):
        return None
    for pattern, replacement in RENAMED:
        renamed, hits = pattern.subn(replacement, key, count=1)
        if hits and pattern.match(key):
            return renamed
    raise ValueError(f"unknown tensor {key}")


def network_of(state):
    """Depth, width, norm, classes and BN momentum of our state dict, from its shapes."""
    try:
        blocks = {int(k.split(".")[2]) for k in state if k.startswith("trunk.layer1.")}
        depth = 6 * len(blocks) + 4
        width, rest = divmod(state["trunk.layer1.0.conv1.weight"].shape[0], 16)
        n_classes = state["trunk.head.weight"].shape[0]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"no Wide-ResNet's tensors ({error})") from error
    if rest or not width:
        raise ValueError("layer widths are no multiple of 16")
    if "trunk.norm.running_mean" in state:
        norm = "batch"
    elif "trunk.norm.weight" in state:
        raise ValueError("a norm without running statistics (layer, instance or ActNorm): these "
                         "cannot be told apart by shape")
    else:
        norm = "none"
    return {"depth": depth, "width": width, "n_classes": n_classes, "norm": norm,
            "bn_momentum": 0.9}


def translate(content):
    """(our configuration, our state dict, replay buffer or None) of a loaded file's content."""
    state = state_dict_of(content)
    if state is None:
        raise ValueError("no dictionary of tensors")
    named = {}
    for key, tensor in state.items():
        name = our_name(key)
        if name in named:
            raise ValueError(f"two tensors {name}")
        if name is not None:
            named[name] = tensor
    buffer = None if state is content else content.get("replay_buffer")
    if isinstance(buffer, torch.Tensor) and buffer.numel() == 0:
        buffer = None
    if buffer is not None and (not isinstance(buffer, torch.Tensor) or buffer.dim() != 4
                               or buffer.shape[1] != 3):
        raise ValueError("its replay_buffer is no tensor [n, 3, H, W]")
    return network_of(named), named, buffer


def load_official(path):
    """(JEM on the CPU in eval mode, replay buffer [n, 3, H, W] in [-1, 1] or None).

    Nothing in the file is executed. For a file of unknown origin use
    ``utils.files.checkpoint.open_any``, which also checks sizes and checksums.
    """
    config, state, buffer = translate(torch.load(path, map_location="cpu", weights_only=True))
    model = JEM.build(**config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return model.eval(), buffer
