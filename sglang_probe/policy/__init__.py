"""Arms: named policies under which a workload is run."""
