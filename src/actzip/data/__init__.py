"""actzip.data."""
