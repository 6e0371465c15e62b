"""Walks of layers: what they take on the disk, what they changed; and work in threads that several callers share."""
