"""The FUSE daemon: a protocol adapter over the castore library, the only importer of pyfuse3. It holds no policy."""
