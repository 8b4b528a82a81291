"""Plugins: what they can add, and how they are found."""

from .registration import registry as registry
