"""ExampleGen for images from any source."""
