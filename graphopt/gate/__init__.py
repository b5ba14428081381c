"""The gate: what an optimized model is, written down in a lock, and every check held against it."""
