"""What a training run is made of: its start, its guard, its log."""
