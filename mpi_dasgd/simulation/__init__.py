"""The algorithms, unchanged, on virtual ranks and a virtual clock."""
