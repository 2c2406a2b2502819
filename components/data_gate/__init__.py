"""Stops the pipeline before Transform when the data are not what the schema says."""
