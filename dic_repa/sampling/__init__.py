"""Sampling a trained run: load it, choose the labels, sample, decode, and write a folder of samples."""

SAMPLES_FILE, SAMPLES_NPZ = "samples.json", "samples.npz"  # in a folder of samples: what they are, and ADM's file
