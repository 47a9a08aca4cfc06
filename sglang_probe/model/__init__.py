"""Models that do not ship with the package and can be fetched by name."""
