"""Takes requests through a model: planned, checked, run, kept."""
