"""Facts of the forget set and the retain set: the type, the readers, and the texts that ship with the package."""
