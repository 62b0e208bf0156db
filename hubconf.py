"""The published models by name, for torch.hub.

    jem = torch.hub.load(".", "cifar10_wrn16_4", source="local")     # in a clone of this repository

Each entry returns a ``LoadedModel`` (utils/loading.py) and takes the options of ``load_model``.
"""

import sys as _sys
from pathlib import Path as _Path  # torch.hub lists every name without an underscore

for _name in ("utils", "models", "samplers"):
    _file = getattr(_sys.modules.get(_name), "__file__", None) or __file__
    if not _Path(_file).resolve().is_relative_to(_Path(__file__).resolve().parent):
        raise ImportError(f"JEM++ has a package {_name}, and {_file} is imported under that name: "
                          "load the model before it, or in a process of its own")

from utils.files.published import folder_of as _folder_of  # noqa: E402
from utils.loading import load_model as _load_model  # noqa: E402

dependencies = ["torch", "torchvision", "numpy", "safetensors", "tqdm", "PIL"]


def _entry(folder):
    """The function that torch.hub calls for one published folder."""
    def load(**options):
        return _load_model(folder, **options)

    load.__name__ = folder.name
    load.__doc__ = (f"{folder.name} in eval mode, with sample(); options: device, data_root. Its "
                    f"card is results/models/{folder.name}/README.md.")
    return load


for _folder in sorted((_Path(__file__).resolve().parent / "results" / "models").iterdir()):
    if _folder_of(_folder):
        globals()[_folder.name] = _entry(_folder)
