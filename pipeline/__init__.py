"""The pipeline: its configuration, its graph and the runner for one machine."""
