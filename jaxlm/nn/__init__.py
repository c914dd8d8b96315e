"""Models are made of these: layers, attention, losses, layouts and the kinds of parallelism."""
