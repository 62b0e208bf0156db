"""What is measured of a checkpoint: one function a metric, one a protocol."""
