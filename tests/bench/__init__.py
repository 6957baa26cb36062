"""Benchmarks that run the library against a server they start. Their figures are in docs/BENCHMARKS.md. Not tests."""
