"""Names become objects here: a `Run` becomes a program, a place becomes a model, sources become a corpus."""
