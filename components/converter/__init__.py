"""The exported model in formats for devices and for runtimes other than TensorFlow's."""
