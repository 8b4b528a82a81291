"""Facts to forget and to keep: what one is, where they are read from, and the texts that ship with the package."""
