"""A trained model in use: sample, export, evaluate."""
