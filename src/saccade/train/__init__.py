"""Training: the text grammar that evaluation shares, the data mix, and the recipe of the pocket model."""
