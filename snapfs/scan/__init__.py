"""Walks of layers: what they take, what they changed; and work that several who ask can share."""
