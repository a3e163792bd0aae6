"""Find, cut out and reuse the parts of a neural network that serve the classes you need."""
