"""TFX's Pusher, with a push that is complete or absent."""
