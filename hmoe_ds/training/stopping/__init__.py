"""How a rank ends before its run is done: asked to, or hanging."""
