"""Linear attention: recurrences and what they are joined with."""
