"""Hybrids: exact attention over a part, a cheap summary of the rest."""
