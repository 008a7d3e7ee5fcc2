"""What a run folder holds: checkpoints, records, its lock."""
