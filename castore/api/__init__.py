"""The programs' interfaces: control socket, and later HTTP."""
