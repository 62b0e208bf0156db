"""Measurements on a checkpoint: one function per metric, one per protocol."""
