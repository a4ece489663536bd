"""Features of SAEs: methods on the features of sparse autoencoders and transcoders."""
