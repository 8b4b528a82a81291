"""Asks of an edited model whether a fact is gone or only silenced: attacks, controls, and a verdict by a fixed rule."""
