"""Methods compared on one model, the same facts and one set of metrics, on one page."""
