"""A model at hand: loading it, its structure, how it is asked, and passes through it."""
