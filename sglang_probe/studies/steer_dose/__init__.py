"""What a dose of steering gains and what it costs, and which way of steering gains most at equal cost."""
