"""Load tests of a model server: how fast, how many, what fails, and what it costs in memory."""
