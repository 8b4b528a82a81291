"""Metrics as pure functions, and the report of a run. Every checkpoint is judged in the same way."""
