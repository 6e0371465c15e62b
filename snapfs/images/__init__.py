"""Images of the Open Container Initiative: layouts and archives, and what is in them."""
