"""Values of settings: reading them, and checking them against their ranges."""
