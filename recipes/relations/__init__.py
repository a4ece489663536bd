"""Relations as linear maps, and edits through them."""
