"""Data sets of images, without TensorFlow or TFX."""
