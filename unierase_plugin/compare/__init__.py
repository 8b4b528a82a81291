"""Compares methods on one model, with the same facts and metrics, on one page."""
