"""Two hops and backpatching: questions in two hops, and states that are patched back."""
