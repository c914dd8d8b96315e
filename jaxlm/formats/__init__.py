"""Other people's files, in and out: each driven by the families' name tables (`jaxlm/names.py`)."""
