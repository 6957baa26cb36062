"""The FUSE daemon: a protocol adapter over the castore library, and the only importer of pyfuse3. It holds no policy."""
