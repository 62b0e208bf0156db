"""Data, files, flags and metrics."""


def load_model(path, **options):
    """A trained model for use from Python: see utils.loading.load_model, which this is."""
    from utils.loading import load_model  # here: most of utils does not wait for torch

    return load_model(path, **options)
