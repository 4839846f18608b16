"""Methods of the decode family, one paper a file."""
