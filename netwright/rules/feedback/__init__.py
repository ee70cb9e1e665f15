"""Feedback: from the error, by other weights."""
