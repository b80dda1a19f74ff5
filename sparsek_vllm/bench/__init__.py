"""``sparsek bench``: our kernels and every installed peer, timed side by side."""
