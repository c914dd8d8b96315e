"""A weight may be more than an array: quantized, with an adapter on it, or merged of several models."""
