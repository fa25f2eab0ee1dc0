"""Speed, measured so that anyone can repeat it: `dic-repa bench`.

Everything that is compared runs in one process, in turns and repeatedly, so that a falling clock rate or a busy
neighbour slows all of it equally; reported are the median and its quartiles.
"""
