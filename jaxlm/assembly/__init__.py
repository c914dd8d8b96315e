"""Names become objects here: a `Run` becomes a program, a place a model, sources a corpus."""
