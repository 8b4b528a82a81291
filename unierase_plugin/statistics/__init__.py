"""Second moments of keys (the field's covariance statistics): counted, kept, imported and exported."""
