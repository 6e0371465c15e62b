"""What changed in a snapshot, brought into an ordinary directory."""
