"""An hour of mixed traffic through one gateway, which must hold no more at the end than at the start: `make soak`."""
