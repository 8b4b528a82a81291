"""Covariance statistics: the second moments of keys. Computing, keeping, importing and exporting them."""
