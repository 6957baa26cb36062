"""Verify: re-read what is stored and compare digests."""
