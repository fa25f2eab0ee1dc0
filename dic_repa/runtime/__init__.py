"""What a process does while it runs: processes, threads, precision, and messages to the user."""
