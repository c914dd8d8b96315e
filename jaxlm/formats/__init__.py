"""Other people's files, in and out: each driven by the families' name tables (`jaxlm/core/weight_names.py`)."""
