"""Surgery on any network: which channels belong together, and the network without some of them."""
