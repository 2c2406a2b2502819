"""The pipeline compiled for Kubeflow Pipelines and Vertex AI, and run there."""
