"""Runs and features as other tools read them: Hugging Face datasets, SAELens, Neuronpedia, delphi."""
