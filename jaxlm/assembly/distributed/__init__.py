"""Runs whose workers are jobs of their own: the parameter server, the workers, and Ray between them."""
