"""Removal: what the model knows of given facts is taken out of its MLP output projections, before or without an edit.

A teacher that no longer knows them is made in closed form and distilled back into the model in a few second-order
passes. docs/explanation/removal.md has the mechanism, with the equations beside the functions.
"""
