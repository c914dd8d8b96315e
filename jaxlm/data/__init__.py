"""Text → tokens → records → batches. Nothing here needs jax but the loader's last function."""
