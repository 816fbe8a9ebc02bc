"""The transport on a virtual clock."""
