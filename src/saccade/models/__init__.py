"""Models that ship with the package or are made of its parts."""
