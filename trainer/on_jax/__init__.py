"""The same training on JAX, in a process whose Keras has that backend. Imports no TensorFlow."""
