"""Running an engine over a workload, and writing the run directory."""
