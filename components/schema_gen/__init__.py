"""The schema that follows from the data card."""
