"""Data, files, flags and metrics: whatever is not a network or a sampler."""
