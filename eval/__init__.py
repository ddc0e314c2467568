"""Measuring: paired runs, metrics, result rows, reports."""
