"""Questions in two hops, and backpatching."""
