"""Tests of castore.storage."""
