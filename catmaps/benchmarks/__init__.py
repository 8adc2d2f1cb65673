"""Speed and memory, beside a plain dense reference: `catmaps bench`."""
