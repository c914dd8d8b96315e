"""Everything is built on these: the configuration of a run, specs of weights, trees by path, names and errors."""
