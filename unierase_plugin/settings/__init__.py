"""Values of settings: read, and checked against their ranges."""
