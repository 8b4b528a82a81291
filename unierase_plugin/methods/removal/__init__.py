"""Removal as a method of its own, and as a stage of others."""
