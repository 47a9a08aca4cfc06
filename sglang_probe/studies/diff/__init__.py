"""Which features differ between two groups of texts."""
