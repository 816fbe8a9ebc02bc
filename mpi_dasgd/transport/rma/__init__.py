"""The transport on MPI windows."""
