"""The model: loading it, finding its parts, asking it, and running passes through it."""
