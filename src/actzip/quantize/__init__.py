"""actzip.quantize."""
