"""Examples; all but the demo are single files that run by their path."""
