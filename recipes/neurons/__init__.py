"""Single neurons: what one does, and whether it matters."""
