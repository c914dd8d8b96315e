"""Each fused kernel stands beside the plain function that it must equal."""
