"""The parts of a training run: its start, its guard, its log."""
