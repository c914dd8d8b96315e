"""Evaluation, separate from training: reads a configuration and weights, never the loop or the step."""
