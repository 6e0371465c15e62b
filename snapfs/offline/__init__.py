"""What is done to a root that nobody serves: checking, rebuilding, copies of its records."""
