"""The Vision Transformer and everything needed to train and export it."""
