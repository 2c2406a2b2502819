"""The networks: Keras alone, whichever backend it has."""
