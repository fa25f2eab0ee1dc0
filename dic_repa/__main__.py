"""`python -m dic_repa`, the same as the console script `dic-repa`."""

from dic_repa.cli import main

if __name__ == "__main__":
    main()
