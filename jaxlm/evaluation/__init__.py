"""Evaluation is separate from training: it reads a configuration and weights, never the loop or the step."""
