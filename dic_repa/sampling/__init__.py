"""Sampling a trained run: load it, choose the labels, sample, decode, and write a folder of samples."""
