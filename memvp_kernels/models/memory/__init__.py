"""From an image to the memory that every layer reads: the vision tower, the projector, the learned positions."""
