"""Weights and states on disk are read and written here, our own and other people's formats.

Published formats follow from the families' name tables (`jaxlm/core/weight_names.py`).
"""
