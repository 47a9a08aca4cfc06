"""Workloads: where text comes from (sources), how it becomes labelled tokens (render), and the requests (build)."""
