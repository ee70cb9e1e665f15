"""Denoising: each block mends a noisy label."""
