"""actzip.profile."""
