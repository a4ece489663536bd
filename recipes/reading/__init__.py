"""What states say: patchscopes, the logit lens, Jacobians."""
