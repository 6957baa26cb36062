"""The scrub: every location is re-read, its digest recomputed, and what was found recorded."""
