"""Static patterns: what is read depends on positions, never on content."""
