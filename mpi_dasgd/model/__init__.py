"""A torch model as ranks exchange it: its parameters as one vector, its buffers as bytes."""
