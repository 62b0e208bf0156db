"""What is read and written: checkpoints, records."""
