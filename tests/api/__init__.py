"""Tests of the HTTP API and the documents that it gives out."""
