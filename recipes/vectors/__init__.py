"""Vectors of tasks: the vector of a task, the heads that carry it, and sums of vectors."""
