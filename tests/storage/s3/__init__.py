"""Tests of the S3 backend on a real S3 server."""
