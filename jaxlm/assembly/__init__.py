"""Where names become objects: a `Run` becomes a program, a place a model, sources a corpus."""
