"""Files: reading them with care, writing them whole or not at all, and keeping results for later runs."""
