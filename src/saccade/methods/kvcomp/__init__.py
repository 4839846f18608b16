"""Methods of the kvcomp family, one paper a file."""
