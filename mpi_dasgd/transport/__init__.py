"""Transport: Publication and Inbox, on MPI windows (rma) or on a virtual clock (virtual)."""
