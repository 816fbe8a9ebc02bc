"""How old gradients are, and what that does to a step."""
