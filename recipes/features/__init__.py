"""Methods on the features of sparse autoencoders."""
