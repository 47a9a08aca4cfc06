"""What the policy of a harvest does to a dictionary, beside what repeating, reordering and reseeding do."""
