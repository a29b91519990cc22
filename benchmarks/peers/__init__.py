"""A benchmark against peers: the same weights, the same JPEGs, one run (`make bench-peers`)."""
