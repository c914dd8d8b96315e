"""Makes smaller models of trained ones: pure functions of specs, weights and what a calibration recorded.

What a weight is for is read from its `Spec`, as in `weights/grow`, which is the other direction. Weights are nested
dicts of NumPy arrays.
"""
