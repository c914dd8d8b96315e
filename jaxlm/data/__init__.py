"""The data pipeline turns text into tokens, tokens into records, and records into batches.

Nothing here needs jax but the loader's functions that put a batch onto devices.
"""
