"""Finds, loads, wraps and examines models."""
