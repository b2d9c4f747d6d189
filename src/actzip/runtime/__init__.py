"""actzip.runtime."""
