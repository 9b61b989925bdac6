"""Using a trained model: sample, export, evaluate."""
