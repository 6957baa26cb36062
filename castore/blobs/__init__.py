"""The read path: blocks of blobs, checked, from memory or a backend. Knows neither paths nor packages.

A read asks `open_blob` for bytes; blocks that memory lacks become flights (`flights`), one for each block however many
readers want it; a flight fills a buffer from the first location that gives good bytes (`fetch`).
"""
