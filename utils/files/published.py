"""Published models. Each is a folder with two files.

config.json holds all plain values of the checkpoint. model.safetensors holds the weights and, as
uint8, images of the replay buffer.
"""

import json
from pathlib import Path

import safetensors.torch

from utils.files.records import jsonable, replacing, write_json
from utils.files.regular import read_bytes
from utils.files.torch_files import read_hashed
from utils.program import InputError

CONFIG, TENSORS = "config.json", "model.safetensors"
BUFFER = "replay_buffer"  # its name among the tensors; weights are named stem.… and trunk.…


def folder_of(path):
    """The published folder if ``path`` is one or is its model.safetensors, else None."""
    path = Path(path)
    folder = path.parent if path.name == TENSORS else path
    return folder if (folder / CONFIG).is_file() and (folder / TENSORS).is_file() else None


def write(folder, content, digest):
    """Write a checkpoint's ``content`` to ``folder``. ``digest`` computes its "sha256"."""
    plain = {k: v for k, v in content.items() if k not in ("model", "buffer", "sha256")}
    plain = json.loads(json.dumps(jsonable(plain)))  # as it will be read
    parts = {"model": content["model"], "buffer": content["buffer"]}
    plain["sha256"] = digest(plain | parts)
    tensors = {k: v.contiguous() for k, v in content["model"].items()}
    if content["buffer"] is not None:
        tensors[BUFFER] = content["buffer"].contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / TENSORS) as file:
        file.write(safetensors.torch.save(tensors, {"format": "pt"}))
    write_json(folder / CONFIG, plain)


def read(folder):
    """(content as given to ``write``, SHA-256 of model.safetensors). The content is not checked.

    A one-line InputError for files that hold anything else.
    """
    tensors, sha256 = read_hashed(folder / TENSORS)
    try:
        plain = json.loads(read_bytes(folder / CONFIG, most=2**24))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / CONFIG} is cut short, damaged or of another kind "
                         f"[{str(error)[:120]}]") from error
    if not isinstance(plain, dict) or not isinstance(tensors, dict):
        raise InputError(f"{folder / CONFIG} is not what scripts/publish.py writes")
    content = plain | {"buffer": tensors.pop(BUFFER, None), "model": tensors}
    return content, sha256
