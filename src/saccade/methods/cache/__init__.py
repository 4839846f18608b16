"""Methods of the cache family, one paper a file."""
