"""What a process does while it runs: processes, threads, precision, and what it tells the user."""
