"""Holds distributed optimizers as pure functions: outer optimizers, compression of deltas, fragments, and workers that
one program trains."""
