"""What models are made of: layers, attention, losses, layouts and the kinds of parallelism."""
