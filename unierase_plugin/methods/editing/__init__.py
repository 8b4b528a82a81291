"""Methods that locate and edit: UniErase, ROME, MEMIT and AlphaEdit."""
