"""Training is the pure update and its record: step, optimizers, loop, log and report."""
