"""The registry: the rules over the catalog. It says nothing of any one kind of store."""
