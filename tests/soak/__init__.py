"""An hour of mixed traffic through one gateway, which must then hold no more than in the beginning: `make soak`."""
