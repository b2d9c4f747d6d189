"""actzip.models."""
