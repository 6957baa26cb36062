"""SQLite. The only place that imports it: the catalog (facts) and the workspace (the ingest tree)."""
