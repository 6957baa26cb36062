"""The backends, one module each, imported only when the configuration names one."""
