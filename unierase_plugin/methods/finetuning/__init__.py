"""Methods that train: losses, settings, batches and the training itself."""
