"""Monitors: a profile of what is usual, alarms on single trajectories, and drift of the stream of them."""
