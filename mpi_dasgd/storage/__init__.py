"""Files of a run: one run file per rank, checkpoints, and the results of all ranks."""
