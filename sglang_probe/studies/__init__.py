"""Studies: what the recordings say. Nothing here imports SGLang."""
