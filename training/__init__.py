"""One training run: configuration, strategies, the loop and what it leans on."""
