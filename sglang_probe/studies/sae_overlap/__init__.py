"""Which features two regimes of rows use, and whether they mean the same: each statistic beside its nulls."""
