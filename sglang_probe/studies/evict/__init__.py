"""The eviction lab: a grid of policies, budgets and protocols on captured requests, judged offline and, where kept sets
were run in the engine, by what was generated."""
