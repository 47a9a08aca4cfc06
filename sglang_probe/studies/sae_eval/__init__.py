"""Judging a sparse autoencoder on recorded rows: by kind of row, and where it was not trained."""
