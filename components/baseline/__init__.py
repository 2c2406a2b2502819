"""Finds the model that a new one has to be at least as good as."""
