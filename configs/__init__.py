"""Training configurations: defaults with their reasons in common.py, one file per run."""
