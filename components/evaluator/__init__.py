"""TFX's Evaluator, for pipelines whose baseline may not exist yet."""
