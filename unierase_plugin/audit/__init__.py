"""Tests whether a fact is gone from an edited model or only silenced: attacks, controls, and a verdict by a rule."""
