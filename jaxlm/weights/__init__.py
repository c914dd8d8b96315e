"""A weight may be more than an array: quantized, or with an adapter on it."""
