"""The pipeline's own TFX components and the data set they read."""
