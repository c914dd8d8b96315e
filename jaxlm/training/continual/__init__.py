"""Holds continual learning as pure functions over trees of weights and gradients: penalties, tracks, projections."""
