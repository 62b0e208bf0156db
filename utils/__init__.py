"""Data, files, flags and metrics."""
