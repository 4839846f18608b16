"""Methods of the prefill family, one paper a file."""
