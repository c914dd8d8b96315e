"""What a weight may be besides an array: quantized, or with an adapter on it."""
