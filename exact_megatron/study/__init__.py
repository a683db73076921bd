"""Paired runs: the same base, data, order and schedule, without and with EXACT."""
