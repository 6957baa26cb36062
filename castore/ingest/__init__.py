"""Ingest: the writable tree, its staged bytes, their puts in the background, and publish."""
