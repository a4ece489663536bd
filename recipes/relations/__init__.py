"""Relations: linear maps of relations, and edits through them."""
