"""ExampleGen for data sets in CIFAR-100's binary layout."""
