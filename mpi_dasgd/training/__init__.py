"""The training of one rank, on real windows."""
