"""The tree through the kernel's FUSE, by pyfuse3: translation, caching and the serving loop."""
