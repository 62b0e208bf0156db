"""The published models by name, for torch.hub.

    jem = torch.hub.load(".", "cifar10_wrn16_4", source="local")     # in a clone of this repository

Each entry returns a ``LoadedModel`` (utils/loading.py) and takes the options of ``load_model``.
"""

from pathlib import Path as _Path  # torch.hub lists every name without an underscore

from utils.files.published import folder_of as _folder_of
from utils.loading import load_model as _load_model

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
