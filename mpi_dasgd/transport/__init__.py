"""Publications and inboxes of ranks, on MPI windows (`rma`) or on a virtual clock (`virtual`)."""
