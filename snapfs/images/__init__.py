"""Images, and archives of layers: found, fetched, unpacked and written."""
