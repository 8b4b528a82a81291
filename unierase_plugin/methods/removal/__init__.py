"""Removal as its own method, and as a stage of other methods."""
