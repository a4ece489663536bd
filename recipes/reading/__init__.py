"""Reading states: patchscopes, the logit lens, Jacobians."""
