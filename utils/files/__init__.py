"""Files that the programs read and write: checkpoints and records."""
