"""Removal: takes the model's knowledge of given facts out of its MLP output projections, before or without an edit.

A teacher that does not know the facts is made in closed form. A few second-order passes distil it back into the model.
docs/explanation/removal.md explains the mechanism. The equations stand beside the functions.
"""
