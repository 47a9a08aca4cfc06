"""What the features of an SAE are about: a dashboard, heuristic labels, and what these are worth."""
