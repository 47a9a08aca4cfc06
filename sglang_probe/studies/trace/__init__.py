"""What one prediction used: attribution to features and errors, and the ablations that check it."""
