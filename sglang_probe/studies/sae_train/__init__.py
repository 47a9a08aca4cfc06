"""Training of sparse autoencoders on recorded rows: from runs to dictionaries that are judged on rows held out."""
