"""Tasks: data sets, networks, and convex problems with a known optimum."""
