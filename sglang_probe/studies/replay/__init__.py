"""Whether stored requests were served under the interventions that a manifest of features states."""
