"""What is on the disk: atomic writes, folders of output, weights, pictures, and files of the hub."""
