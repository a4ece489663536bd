"""Steering: directions that change what a model writes, and generation under edits."""
