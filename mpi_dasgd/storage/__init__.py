"""What a run leaves on disk: one run file per rank, checkpoints, and the results of all ranks."""
