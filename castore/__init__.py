"""castore: a content-addressed file system. This package is the library; it never imports pyfuse3."""

__version__ = "0.1.0"
