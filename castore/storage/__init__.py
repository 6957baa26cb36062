"""Storage of objects: the contract, the backends, and what wraps them. Nothing here knows the catalog."""
