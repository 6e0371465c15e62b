"""Work on a root that no daemon serves: checking and rebuilding; and copies of its records."""
