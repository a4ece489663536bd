"""Directions that change what a model writes, and generation under edits."""
