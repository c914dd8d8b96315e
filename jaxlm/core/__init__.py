"""The configuration of a run, weights before they exist, trees by path, and one-line errors."""
