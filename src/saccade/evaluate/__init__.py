"""Measuring methods next to dense attention: seeded offline tasks, scores with intervals, the comparison."""
