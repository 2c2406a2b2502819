"""CIFAR-100 on disk: its formats, where to find it, and a synthetic stand-in (no TensorFlow)."""
