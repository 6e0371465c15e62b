"""The records of one root, in LMDB."""
