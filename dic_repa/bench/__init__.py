"""Speed, measured so that anyone can repeat it: `dic-repa bench`.

Everything that is compared runs in one process, interleaved and repeated, so that a clock that sinks or a busy
neighbour slows all of it alike; what is reported is the median with its quartiles.
"""
