"""Look at a model and change nothing: which neurons it has, what hangs together, and where they can be read."""
