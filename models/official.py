"""Read checkpoints of others: the released files of JEM, JEM++ and SADA-JEM.

They hold ``{"model_state_dict": ..., "replay_buffer": [n, 3, H, W]}`` or a bare state dict, in
PyTorch's zip or pre-1.6 format. Depth, width, norm and class count are read off the shapes. JEM++
files repeat tensors (``f.layer_one``, ``f.other_layers``), JEM files carry an unused
``f.linear``, and both an ``energy_output`` head that the classifier's energy does not use.
What is none of theirs is a ValueError.
"""

import re

import torch

from models.jem import JEM

REPEATED_OR_UNUSED = re.compile(r"f\.layer_one\.|f\.other_layers\.|f\.linear\.|energy_output\.")
RENAMED = (  # (pattern, ours); after a "module." of DataParallel is dropped
    (re.compile(r"f\.conv1\."), "stem."),
    (re.compile(r"f\.(layer\d\.\d+)\.bn([12])\."), r"trunk.\1.norm\2."),
    (re.compile(r"f\.(layer\d\.\d+)\.conv([12])\."), r"trunk.\1.conv\2."),
    (re.compile(r"f\.(layer\d\.\d+)\.shortcut\.0\."), r"trunk.\1.shortcut."),
    (re.compile(r"f\.bn1\."), "trunk.norm."),
    (re.compile(r"class_output\."), "trunk.head."),
)


def is_official(content):
    """Whether a loaded file looks like a released one (by its keys, not its name)."""
    state = state_dict_of(content)
    return state is not None and any(k.startswith(("f.", "module.f.")) for k in state)


def state_dict_of(content):
    """The dictionary of tensors in ``content``, or None."""
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        return None
    good = all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())
    return state if good else None


def our_name(key):
    """Our name of a released tensor, None for one that is repeated or unused."""
    key = key.removeprefix("module.")
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


def convert(content):
    """The (JEM, replay buffer or None) in a released file's content."""
    state = state_dict_of(content)
    if state is None:
        raise ValueError("no dictionary of tensors")
    named = {our_name(key): tensor for key, tensor in state.items()}
    named.pop(None, None)
    try:
        model = JEM.build(**network_of(named))
        model.load_state_dict(named)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    buffer = content.get("replay_buffer") if "model_state_dict" in content else None
    if isinstance(buffer, torch.Tensor) and buffer.numel() == 0:
        buffer = None
    if buffer is not None and (not isinstance(buffer, torch.Tensor) or buffer.dim() != 4
                               or buffer.shape[1] != 3):
        raise ValueError("its replay_buffer is no tensor [n, 3, H, W]")
    return model, buffer


def load_official(path):
    """(JEM on the CPU in train mode, replay buffer [n, 3, H, W] in [-1, 1] or None).

    Nothing in the file is executed. For a file of unknown origin use
    ``utils.files.checkpoint.open_any``, which also checks sizes and checksums.
    """
    return convert(torch.load(path, map_location="cpu", weights_only=True))
