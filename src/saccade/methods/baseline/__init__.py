"""Methods of the baseline family, one paper a file."""
